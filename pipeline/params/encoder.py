"""Section `encoder` of params.yaml: the frozen pretrained network whose features teacher and student are trained on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.params.section import Count, Section

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class EncoderParams(Section):
    """Frozen pretrained encoder.

    name: of `tailor encoders`, or timm/<model>. weights: a .safetensors or .pth file, or hf://owner/name@revision; null
    is the source that `tailor encoders` lists. sha256: of that file; null is the listed one. download: allow the
    download of an hf:// address. licence: accepts a licence with conditions, by the key that `tailor encoders` lists.
    views: number of augmented views of each training image, beside the image itself. crop_padding, flip: of these views.
    """

    name: str
    weights: str | None = None
    sha256: Sha256 | None = None
    download: bool = False
    licence: str | None = None
    views: Annotated[int, Field(ge=0, le=64)] = 0
    crop_padding: Count = 16
    flip: bool = True
