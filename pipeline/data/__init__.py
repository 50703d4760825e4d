"""Rows and pixels: split tables, class prior, data set, stream, duplicates."""
