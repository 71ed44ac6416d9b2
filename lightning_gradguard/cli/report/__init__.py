"""A run as one file to read, keep or mail, made without a server."""
