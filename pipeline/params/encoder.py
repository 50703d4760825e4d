"""Section `encoder` of params.yaml: the pretrained network that computes the features for teacher and student."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.params.data import ImageParams
from pipeline.params.section import Count, Section
from pipeline.params.training import AugmentParams, StudentParams, TrainingParams

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class EncoderParams(Section):
    """Frozen pretrained encoder.

    name: a name that `tailor encoders` lists, or timm/<model>. weights: a .safetensors or .pth file, or
    hf://owner/name@revision; null for the source that `tailor encoders` lists. sha256: hash of that file; null for the
    listed one. download: whether an hf:// address may be downloaded. licence: accepts a licence with conditions; the value
    is in `tailor encoders`. views: number of stored augmented views of each training image, besides the image itself.
    crop_padding, flip: augmentation of these views.
    """

    name: str
    weights: str | None = None
    sha256: Sha256 | None = None
    download: bool = False
    licence: str | None = None
    views: Annotated[int, Field(ge=0, le=64)] = 0
    crop_padding: Count = 16
    flip: bool = True


# Features are computed once, so a training step cannot augment an image. encoder.views stores augmented views instead.
NO_AUGMENT = AugmentParams(crop_padding=0, flip=False, cutout=0)
FIXED = ("crop", "crop_padding", "flip", "policy", "cutout", "mix")


def check_encoder_sections(
    encoder: EncoderParams | None, image: ImageParams, sections: dict[str, TrainingParams]
) -> None:
    """Raise ValueError unless teacher and student have backbone `encoder` if, and only if, there is an encoder."""
    if encoder is None and image.interpolation != "bilinear":
        raise ValueError(f"image.interpolation is {image.interpolation!r}; without an encoder, expected bilinear")
    for name, section in sections.items():
        tune = section.tune if isinstance(section, StudentParams) else "none"
        if (section.backbone == "encoder") != (encoder is not None):
            raise ValueError(
                f"{name}.backbone is {section.backbone!r}, but section encoder is {'null' if encoder is None else 'set'}; "
                "expected backbone: encoder in teacher and student if, and only if, there is an encoder"
            )
        if encoder is None:
            if section.adapter:
                raise ValueError(f"{name}.adapter is {section.adapter}, but there is no encoder; set adapter: 0")
            if tune != "none":
                raise ValueError(f"{name}.tune is {tune}, but there is no encoder; set tune: none")
            continue
        if section.pretrained is not None:
            raise ValueError(f"{name}.pretrained is set; the weights of an encoder are encoder.weights")
        if tune != "none":
            if encoder.views:
                raise ValueError(
                    f"encoder.views is {encoder.views}, but {name}.tune is {tune}, which draws views of the images; set "
                    "encoder.views: 0"
                )
            continue
        for key in FIXED:
            value, allowed = getattr(section.augment, key), getattr(NO_AUGMENT, key)
            if value != allowed:
                raise ValueError(
                    f"{name}.augment.{key} is {value!r}; the features of an encoder are not augmented in training: set "
                    f"{str(allowed).lower()}, and encoder.views for stored views"
                )
