"""Health checks of `tailor doctor`: installation, params, servers, Prefect, last run, ingest, disk space."""
