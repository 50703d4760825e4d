"""Loading and saving of networks (checkpoints, pretrained weights), inference on a split, choice of device."""
