"""Triton's two protocols, with retries and deadlines."""
