"""Prefect flow of retraining: run the DVC stages, apply the gate, then promote or refuse the release."""
