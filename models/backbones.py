"""Backbones by name: the CIFAR ResNets, any torchvision classifier, any timm model; each gives features, not classes."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from models.resnet_cifar import BLOCKS_PER_STAGE, CifarResNet


class UnknownBackboneError(ValueError):
    """A backbone name that no library knows; the message offers the nearest one."""


class Backbone(nn.Module):
    """A network from images [B,3,H,W] to features [B,feature_dim]."""

    def __init__(self, network: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.network = network
        self.feature_dim = feature_dim

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] → features [B,feature_dim]."""
        return self.network(images)


def build_backbone(name: str) -> Backbone:
    """A freshly initialised backbone.

    name: `resnet20|32|44|56|110` (CIFAR), `torchvision/<model>` or `timm/<model>`. Raises UnknownBackboneError with the
    nearest valid name.
    """
    check_backbone(name)
    library, _, model = name.rpartition("/")
    if library == "torchvision":
        return _torchvision_backbone(model)
    if library == "timm":
        return _timm_backbone(model)
    return Backbone(CifarResNet(BLOCKS_PER_STAGE[model]), CifarResNet.feature_dim)


def check_backbone(name: str) -> None:
    """Raise UnknownBackboneError unless `build_backbone` knows the name; nothing is built."""
    library = name.rpartition("/")[0]
    if library == "torchvision":
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        kind = "a torchvision classification model"
    elif library == "timm":
        try:
            import timm
        except ModuleNotFoundError:
            raise UnknownBackboneError(
                f"backbone {name!r} needs timm, which is not installed; pip install timm"
            ) from None
        known, kind = timm.list_models(), "a timm model"
    else:
        known, kind = list(BLOCKS_PER_STAGE), "a CIFAR ResNet, torchvision/<model> or timm/<model>"
    valid = [f"{library}/{entry}" if library in ("torchvision", "timm") else entry for entry in known]
    if name not in valid:
        nearest = difflib.get_close_matches(name, valid, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UnknownBackboneError(f"backbone {name!r} is unknown; expected {kind}{hint}")


def _torchvision_backbone(model: str) -> Backbone:
    import torchvision

    network = torchvision.models.get_model(model, weights=None)
    # Every torchvision classifier ends in one linear layer; without it the network yields the pooled feature.
    path, head = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return Backbone(network, head.in_features)


def _timm_backbone(model: str) -> Backbone:
    import timm

    network: Any = timm.create_model(model, pretrained=False, num_classes=0)
    return Backbone(network, getattr(network, "head_hidden_size", None) or network.num_features)
