"""Backbones, CIFAR ResNets, classifier and projection heads, EMA, autocast, activation checkpointing."""
