"""Errors, whole-file writes, progress bars, lineage, child processes: used by every package of the pipeline."""
