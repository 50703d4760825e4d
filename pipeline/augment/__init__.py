"""Augmentation of a batch on the device it lies on, each image by its own draw: crop, flip, policy, Cutout, mix."""

from pipeline.augment.mix import MixDraws, apply_mix, draw_mix
from pipeline.augment.views import Draws, apply_views, cut_boxes, cuts_originals, draw_views, random_views

__all__ = [
    "Draws",
    "MixDraws",
    "apply_mix",
    "apply_views",
    "cut_boxes",
    "cuts_originals",
    "draw_mix",
    "draw_views",
    "random_views",
]
