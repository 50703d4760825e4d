"""Sections of params.yaml for semantic segmentation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.params.section import Positive, PositiveInt, Section, Share


class SegmentationAugmentParams(Section):
    """Augmentation of an image with its label map: resize, crop, flip, photometric distortion, as in mmsegmentation.

    scale: [long side, short side] in pixels that the image is fitted into, keeping its ratio; None: the image's own
    size. ratio: range of a random factor of that size, uniform. crop: [height, width] in pixels; a smaller image is padded
    with the mean colour and with ignored labels. max_share: a crop is drawn again, up to ten times, if one class has this
    share of its labelled pixels or more; 1 accepts the first crop. flip: mirror half of the images. photometric: random
    brightness, contrast, saturation and hue.
    """

    scale: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    ratio: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [0.5, 2.0]
    crop: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] = [512, 512]
    max_share: Share = 0.75
    flip: bool = True
    photometric: bool = True

    @model_validator(mode="after")
    def _ranges_rise(self) -> SegmentationAugmentParams:
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}; expected the smaller factor first")
        if self.scale and self.scale[0] < self.scale[1]:
            raise ValueError(f"scale is {self.scale}; expected the long side first")
        return self
