"""The stream to the controller: `session` is one connection, `reconnect` decides when the next one is made."""
