"""The playground: a page on a running server, for people."""
