"""Golden requests with known responses: run them on a release (dry run) or send them to a server."""
