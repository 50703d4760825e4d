"""Neural networks: backbones, CIFAR ResNets, classifier and projection heads, EMA, autocast, activation checkpointing."""
