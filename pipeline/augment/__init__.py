"""Data augmentation of a batch on its device, with separate random numbers per image: crop, flip, policy, Cutout, mix."""

from pipeline.augment.mix import MixDraws, apply_mix, draw_mix
from pipeline.augment.segmentation import apply_crops, draw_crops
from pipeline.augment.stored import draw_stored, take_stored
from pipeline.augment.views import Draws, apply_views, cut_boxes, cuts_originals, draw_views

__all__ = [
    "Draws", "MixDraws", "apply_crops", "apply_mix", "apply_views", "cut_boxes", "cuts_originals", "draw_crops", "draw_mix",
    "draw_stored", "draw_views", "take_stored",
]  # fmt: skip
