"""The model repository on disk: write, read, lock, retention, version policy."""
