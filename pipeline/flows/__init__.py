"""Scheduled retraining under Prefect: the stages of DVC, the gate, and the release that goes live or does not."""
