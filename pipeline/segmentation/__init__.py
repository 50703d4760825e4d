"""Data of task segmentation: images with label maps in memory, their figures, network input and class maps."""
