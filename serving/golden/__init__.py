"""Golden requests: known responses, sent to a release or a server."""
