"""Backbones by name, without their classifier: the CIFAR ResNets, any torchvision classifier, any timm model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.networks.resnet_cifar import BLOCKS_PER_STAGE, CifarResNet, MeanOverPositions

OWN = "backbone.network."  # prefix of the backbone's weights in a model.safetensors written by Tailor
PROJECTION = "+projection"  # at the end of timm/<model>: keep the last layer


class UnknownBackboneError(ValueError):
    """A backbone name that is not in any library; the message names the nearest valid one."""


class NoFeatureMapError(ValueError):
    """A backbone does not end in global average pooling, so its feature is not the mean of a map."""

    MESSAGE = "the network does not end in global average pooling"

    def __init__(self) -> None:
        super().__init__(self.MESSAGE)


class Backbone(nn.Module):
    """A network from images [B,3,H,W] to features [B,feature_dim].

    head: the library's name of the removed classifier; "" if there was none. parts: number of parts of equal width that
    the feature consists of, each of length 1 (one for each expert); 1: the feature has no parts.
    """

    parts = 1

    def __init__(self, network: nn.Module, feature_dim: int, head: str = "") -> None:
        super().__init__()
        self.network = network
        self.feature_dim = feature_dim
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] → features [B,feature_dim]."""
        features: Tensor = self.network(images)
        return features

    def with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,H,W] → features [B,D], and the map [B,D,h,w] that the last average pooling gets.

        The features are the mean of the map over its positions if the network ends in that pooling; the caller checks it.
        Raises NoFeatureMapError for a network without such a pooling.
        """
        pools = [
            module for module in self.network.modules() if isinstance(module, MeanOverPositions | nn.AdaptiveAvgPool2d)
        ]
        maps: list[Tensor] = []
        if pools:
            with pools[-1].register_forward_pre_hook(lambda _module, inputs: maps.append(inputs[0])):
                features = self(images)
        if len(maps) != 1 or maps[0].ndim != 4 or maps[0].shape[1] != features.shape[1]:
            raise NoFeatureMapError
        return features, maps[0]

    def rate_factors(self) -> dict[nn.Parameter, float]:
        """Factors of the learning rate, by weight. Empty here: only TunedBackbone has weights with another rate."""
        return {}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load pretrained weights: a state_dict of the same network from its library, or of a classifier written by Tailor.

        Weights of the removed classifier are ignored. Raises ValueError naming the first weight that is missing, has
        another shape or is unknown; nothing is loaded in that case.
        """
        if any(name.startswith(OWN) for name in weights):
            weights = {name.removeprefix(OWN): value for name, value in weights.items() if name.startswith(OWN)}
        elif self.head:
            weights = {name: value for name, value in weights.items() if not name.startswith(f"{self.head}.")}
        expected = self.network.state_dict()
        for name, value in expected.items():
            if name not in weights:
                raise ValueError(f"has no {name}, which this network needs")
            if weights[name].shape != value.shape:
                raise ValueError(f"has {name} of shape {list(weights[name].shape)}; expected {list(value.shape)}")
            if weights[name].is_floating_point() != value.is_floating_point():
                raise ValueError(f"has {name} of type {weights[name].dtype}; expected {value.dtype}")
        for name in weights:
            if name not in expected:
                raise ValueError(f"has {name}, which this network does not have")
        self.network.load_state_dict(weights)


def build_backbone(name: str, image_size: int | None = None) -> Backbone:
    """Create a newly initialised backbone; the feature width is read from its last layer, without a forward pass.

    name: `resnet8|20|32|44|56|110` (CIFAR), `torchvision/<model>` or `timm/<model>` (a colon is accepted for the slash).
    timm/<model>+projection keeps the last layer: that of CLIP maps to the space that image and text features share.
    image_size: side of the input in pixels, for networks with a fixed input size; None: the library's default. Raises
    UnknownBackboneError with the nearest valid name.
    """
    check_backbone(name)
    library, model = _library_and_model(name)
    if library == "torchvision":
        return _torchvision_backbone(model, image_size)
    if library == "timm":
        return _timm_backbone(model, image_size)
    return Backbone(CifarResNet(BLOCKS_PER_STAGE[model]), CifarResNet.feature_dim)


def check_backbone(name: str) -> None:
    """Raise UnknownBackboneError unless `build_backbone` supports the name; no network is built."""
    library, _ = _library_and_model(name)
    if library == "torchvision":
        import torchvision

        models = torchvision.models.list_models(module=torchvision.models)
        # SqueezeNet's last layer is a convolution, so it has no feature vector for a linear classifier.
        names = [model for model in models if not model.startswith("squeezenet")]
        kind = "a torchvision classification model"
    elif library == "timm":
        try:
            import timm
        except ModuleNotFoundError:
            raise UnknownBackboneError(
                f"backbone {name!r} needs timm, which is not installed; pip install timm"
            ) from None
        names, kind = [*timm.list_models(), *timm.list_pretrained()], "a timm model"
    else:
        names, kind = list(BLOCKS_PER_STAGE), "a CIFAR ResNet, torchvision/<model> or timm/<model>"
    valid = [f"{library}/{entry}" for entry in names] if library else names
    canonical = _canonical(name)
    if (canonical.removesuffix(PROJECTION) if library == "timm" else canonical) not in valid:
        nearest = difflib.get_close_matches(canonical, valid, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UnknownBackboneError(f"backbone {name!r} is unknown; expected {kind}{hint}")


def _canonical(name: str) -> str:
    return re.sub(r"^(torchvision|timm):", r"\1/", name)


def _library_and_model(name: str) -> tuple[str, str]:
    library, _, model = _canonical(name).partition("/")
    return (library, model) if library in ("torchvision", "timm") else ("", name)


def _torchvision_backbone(model: str, image_size: int | None) -> Backbone:
    import torchvision

    options: dict[str, Any] = {}
    if model in ("googlenet", "inception_v3"):
        # Their auxiliary classifiers are for training from scratch with an additional loss.
        options = {"aux_logits": False, "init_weights": True}
    elif image_size and model.startswith("vit_"):
        options = {"image_size": image_size}
    elif image_size and model.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    network = torchvision.models.get_model(model, weights=None, **options)
    # Every torchvision classifier ends in a linear layer; without it the network returns the pooled feature.
    path, head = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return Backbone(network, head.in_features, path)


def _timm_backbone(model: str, image_size: int | None) -> Backbone:
    import timm

    model, projected = model.removesuffix(PROJECTION), model.endswith(PROJECTION)
    config = timm.models.get_pretrained_cfg(model)
    sized = image_size and config is not None and config.fixed_input_size
    options: Any = {"img_size": image_size} if sized else {}
    if projected:
        network: Any = timm.create_model(model, pretrained=False, **options)
        return Backbone(network, network.num_classes)
    network = timm.create_model(model, pretrained=False, num_classes=0, **options)
    width = getattr(network, "head_hidden_size", None) or network.num_features
    head = config.classifier if config is not None and isinstance(config.classifier, str) else ""
    return Backbone(network, width, head)
