"""Semantic segmentation: FCN on a dilated backbone, its pixel losses, L_GML on sampled cells, and metrics of areas.

A cell is one position of the feature map, which is smaller than the image by the network's stride.
"""
