"""Checkpoints, pretrained weights, inference, devices."""
