"""One Triton process on this machine, and what restarts it."""
