"""Used by every package of the pipeline: errors, atomic file writes, progress bars, lineage, child processes."""
