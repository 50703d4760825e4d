"""nginx in front of Triton."""
