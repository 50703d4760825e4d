"""The gateway: nginx as a reverse proxy in front of Triton, with limits and TLS."""
