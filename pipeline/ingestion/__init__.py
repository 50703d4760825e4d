"""A drop folder becomes rows of the data set, all or nothing."""
