"""Prefect on this machine, schedules, the trigger of a retraining."""
