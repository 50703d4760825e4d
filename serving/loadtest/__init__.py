"""Load tests: the options, the prepared requests, the senders, the users over time, the verdict."""
