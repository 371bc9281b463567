"""What may ever run, and who says so: the TUF catalogue, its keys, and the director that signs assignments."""
