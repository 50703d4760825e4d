"""Run Prefect's server for a project, run the schedule, and trigger a retraining."""
