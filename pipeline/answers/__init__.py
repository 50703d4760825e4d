"""Fit and measure what a release answers beyond probabilities: temperature, prediction sets, unknown images, taxonomy nodes."""
