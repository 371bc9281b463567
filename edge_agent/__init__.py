"""The edge side: runs models next to the devices and answers them, with or without the controller."""
