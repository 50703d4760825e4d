"""Predictions, metrics, intervals, the gate, comparison of runs."""
