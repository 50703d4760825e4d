"""Pretrained encoders: check the licence, build the network, load the weights, compute features."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.networks.backbones import PROJECTION, Backbone, UnknownBackboneError, build_backbone
from models.networks.encoders import HUB, PACKAGE, Encoder, UnknownEncoderError, find_encoder
from models.preprocess import FILTERS
from pipeline.augment import Draws, apply_views, draw_views
from pipeline.data.dataset import normalise
from pipeline.model_io.pretrained import HUB_FILE, locate, read_weights
from pipeline.params import AugmentParams, EncoderParams, ImageParams
from pipeline.shared.artifacts import sha256_of_json
from pipeline.shared.errors import ParamsError
from pipeline.shared.fingerprint import sha256_of_sources

FREE_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "unknown")  # others of timm have conditions
# The source files that compute a feature from an encoded image.
FEATURE_CODE = (
    "models/networks/backbones.py",
    "models/preprocess.py",
    "pipeline/data/stream_decoding.py",
    "pipeline/model_io/encoder.py",
)


@dataclass(frozen=True)
class EncoderRecord:
    """The facts that a release records about its encoder.

    model: timm's name of the network. source: source of the weights. sha256: hash of their file. size: image side, pixels.
    """

    name: str
    model: str
    licence: str
    source: str
    sha256: str
    size: int
    width: int


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder in eval mode, without gradients: network maps normalised images [B,3,H,W] to features [B,width]."""

    network: Backbone
    record: EncoderRecord

    def key(self, image: ImageParams) -> str:
        """Hash everything but the image that a feature depends on: encoder, section image, code, version of timm."""
        record = {key: value for key, value in asdict(self.record).items() if key not in ("licence", "source")}
        code = sha256_of_sources(*FEATURE_CODE)
        return sha256_of_json(
            {"encoder": record, "image": image.model_dump(mode="json"), "code": code, "timm": version("timm")}
        )

    def features(self, pixels: Tensor, hashes: np.ndarray, image: ImageParams, views: EncoderParams) -> Tensor:
        """Compute features float16 [B,1+V,D] on the CPU: of the image itself, then of V views.

        pixels: uint8 [B,3,H,W] on the encoder's device. hashes: sha256 of the encoded images, uint8 [B,32]. views:
        section `encoder`, which sets the weak views (crop and flip). The random numbers of an image's views depend on its
        hash alone, not on the other images of the batch.
        """
        batches = pixels[None]
        if views.views:
            weak = AugmentParams(crop_padding=views.crop_padding, flip=views.flip, cutout=0)
            seeds = [int.from_bytes(digest.tobytes()[:8], "little") >> 1 for digest in hashes]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            drawn = [draw_views(1, *pixels.shape[2:], views.views, weak, generator).tables for generator in generators]
            draws = Draws(tuple(torch.cat(tables, 1) for tables in zip(*drawn, strict=True)))
            batches = torch.cat([batches, apply_views(pixels, draws.to(pixels.device), weak)])
        with torch.inference_mode():
            features = [self.network(normalise(batch, image)).half().cpu() for batch in batches]
        return torch.stack(features, 1)


def describe(params: EncoderParams) -> Encoder:
    """Return the entry of `tailor encoders`; for timm/<model> an entry from timm's own description of the model."""
    if not params.name.startswith("timm/"):
        try:
            return find_encoder(params.name)
        except UnknownEncoderError as error:
            raise ParamsError(f"encoder.name is {params.name!r}; {error}") from None
    model = params.name.removeprefix("timm/")
    try:
        network = build_on_meta(model)
    except UnknownBackboneError as error:
        raise ParamsError(f"encoder.name: {error}") from None
    config = _timm_config(model)
    licence = config.license or "unknown"
    return Encoder(
        params.name, model, config.input_size[-1], network.feature_dim, sum(p.numel() for p in network.parameters()),
        tuple(config.mean), tuple(config.std), licence,
        f"{HUB}{config.hf_hub_id}@main" if config.hf_hub_id else "",
        interpolation=config.interpolation, accept="" if licence in FREE_LICENCES else licence,
    )  # fmt: skip


def load_encoder(params: EncoderParams, image: ImageParams) -> LoadedEncoder:
    """Load the encoder of section `encoder` for images of section `image`, on the CPU.

    Raises ParamsError that names the key for: another mean, std or interpolation, a licence that is not accepted, weights
    that do not exist, are damaged, have another sha256 or belong to another network, and an image size that the network
    cannot take.
    """
    encoder = describe(params)
    _check_image(encoder, image)
    if encoder.accept and params.licence != encoder.accept:
        raise ParamsError(
            f"encoder.licence is {json.dumps(params.licence)}; {encoder.name} has the {encoder.licence}: read it, and set "
            f"encoder.licence: {encoder.accept} to accept it"
        )
    source, expected = params.weights or encoder.source, params.sha256 or (encoder.sha256 if not params.weights else "")
    if not source:
        raise ParamsError(f"encoder.weights is null, and no source of {encoder.name} is known; give a file")
    if not expected:
        raise ParamsError(
            f"encoder.sha256 is null, and no sha256 is listed for {source}; give the one that its publisher shows (on the "
            f"hub, the page of {HUB_FILE}), or of a file that you trust: sha256sum FILE"
        )
    path = locate(source, params.download)
    network = _built(encoder, image.size)
    weights = read_weights(path, expected, "encoder.weights", "encoder.sha256")
    try:
        load_encoder_weights(network, weights, by_order=encoder.by_order and not params.weights)
    except ValueError as error:
        raise ParamsError(f"encoder.weights: {path} {error}; are these the weights of {encoder.name}?") from None
    _fit_size(network, encoder, image.size)
    # The record contains no path of this machine.
    recorded = source if source.startswith((HUB, PACKAGE)) else path.name
    record = EncoderRecord(
        encoder.name, encoder.model, encoder.licence, recorded, expected, image.size, network.feature_dim
    )
    return LoadedEncoder(network.requires_grad_(False).eval(), record)


def build_encoder(name: str, size: int) -> Backbone:
    """Build an encoder by name, for images of size x size pixels, with random weights. Raises as `load_encoder`."""
    encoder = describe(EncoderParams(name=name))
    network = _built(encoder, size)
    _fit_size(network, encoder, size)
    return network


def load_encoder_weights(network: Backbone, weights: dict[str, Tensor], by_order: bool = False) -> None:
    """Load a state_dict with the network's names, or with other names in the same order, then an optional classifier.

    Raises ValueError as Backbone.load_weights does.
    """
    if by_order or not set(weights) & set(network.network.state_dict()):
        names = list(network.network.state_dict())
        if len(weights) - len(names) not in (0, 2):  # 2: weight and bias of the classifier
            raise ValueError(f"holds {len(weights)} tensors; expected {len(names)}, or 2 more for a classifier")
        weights = dict(zip(names, weights.values(), strict=False))
    network.load_weights(weights)


def _check_image(encoder: Encoder, image: ImageParams) -> None:
    trained = {"mean": list(encoder.mean), "std": list(encoder.std)}
    if encoder.interpolation in FILTERS:  # timm has models of other filters, which the server does not have
        trained["interpolation"] = encoder.interpolation
    for key, value in trained.items():
        if getattr(image, key) != value:
            raise ParamsError(
                f"image.{key} is {getattr(image, key)}; {encoder.name} was trained with {value}: set image.{key}: {value}"
            )


def build_on_meta(model: str) -> Backbone:
    """Build the network on the meta device, without memory for its weights. Raises UnknownBackboneError."""
    with torch.device("meta"):
        return build_backbone(f"timm/{model}")


def _built(encoder: Encoder, size: int) -> Backbone:
    try:
        with torch.random.fork_rng(devices=[]):
            # Built for the size of the weights; _fit_size then interpolates their position embeddings.
            fixed = "/" not in encoder.model and _timm_config(encoder.model).fixed_input_size
            return build_backbone(f"timm/{encoder.model}", None if fixed else size)
    except UnknownBackboneError as error:
        raise ParamsError(f"encoder.name: {error}") from None


def _fit_size(network: Backbone, encoder: Encoder, size: int) -> None:
    """Interpolate the position embeddings if the input size is fixed, and check that the network supports the size."""
    inner: Any = network.network
    try:
        if _timm_config(encoder.model).fixed_input_size and size != encoder.size:
            inner.set_input_size(img_size=(size, size))
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ParamsError(
            f"image.size is {size}, which {encoder.name} cannot take ({reason}); its own size is {encoder.size}"
        ) from None


def _timm_config(model: str) -> Any:
    import timm

    return timm.models.get_pretrained_cfg(model.removesuffix(PROJECTION)) or timm.models.PretrainedCfg()
