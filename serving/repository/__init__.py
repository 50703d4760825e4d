"""The model repository on disk: write, read, lock, manifest, configs, version policy, promotion log, retention."""
