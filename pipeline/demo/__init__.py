"""What `make demo` and `make retrain-demo` run."""
