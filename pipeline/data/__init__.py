"""Data of a run: split tables, class prior, data set in memory or as a stream, image checks, duplicates."""
