"""Programs that `make demo` and `make retrain-demo` run."""
