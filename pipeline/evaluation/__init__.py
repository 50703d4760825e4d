"""Predictions, metrics, confidence intervals, the promotion gate and the comparison of runs."""
