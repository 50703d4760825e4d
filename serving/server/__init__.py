"""Run one Triton server on this machine: start, stop, health checks, restart, model control."""
