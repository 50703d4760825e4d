"""Ingest labelled images from a drop folder into the training data, as one transaction."""
