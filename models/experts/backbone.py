"""A backbone with several experts: a trunk that they share and a branch for each, split from one backbone by name.

ONNX export gives one graph, in which the trunk runs once. The feature of an image keeps one dimension, so that
evaluation, export and serving treat the network as any other: see ExpertBackbone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.autocast import full_precision
from models.networks.backbones import Backbone, build_backbone
from models.networks.resnet_cifar import BLOCKS_PER_STAGE, WIDTHS, CifarResNet

Shared = Literal["nothing", "early", "late", "map"]
Join = Literal["unit", "mean", "plain"]
NARROW_CIFAR = (16, 24, 48)  # channels of the stages of a narrowed branch, from the code of RIDE
NARROW = (192, 384)  # planes of layer3 and layer4 of a narrowed branch, from the code of RIDE


class SplitError(ValueError):
    """A backbone that cannot be split into a trunk and branches; the message states which can."""


class Split(NamedTuple):
    """Trunk images [B,3,H,W] → map, branch map → features [B,width]."""

    trunk: nn.Module
    branch: nn.Module
    width: int


class ExpertNetwork(nn.Module):
    """The trunk and the branches: images [B,3,H,W] → features of each expert [B,E,D]. The trunk runs once for an image."""

    def __init__(self, trunk: nn.Module, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.branches = nn.ModuleList(branches)

    def forward(self, images: Tensor, separate: bool = False) -> Tensor:
        """images [B,3,H,W] → features [B,E,D].

        separate: expert e takes the images e, e + E, e + 2E, ... only, and they pass the trunk as a batch of their own, of
        which batch norm uses the statistics; [B,3,H,W] → [B/E,E,D].
        """
        own: Iterable[Tensor]
        if separate:
            own = (self.trunk(images[first :: len(self.branches)]) for first in range(len(self.branches)))
        else:
            own = itertools.repeat(self.trunk(images))
        return torch.stack([branch(maps) for branch, maps in zip(self.branches, own, strict=False)], 1)


class ExpertBackbone(Backbone):
    """Backbone with E experts: images [B,3,H,W] → feature.

    The feature is that of the network whose logits are the mean over the experts. join: `unit`, if each expert has its own
    cosine classifier - the features of the experts, each scaled to length 1, one after the other, [B,E*D]. The mean of
    their cosines is then the cosine with one class matrix (CosineClassifier.matrix). `mean`, if the experts share one linear
    classifier - the mean of their features, [B,D]. `plain`, for one linear classifier on all features - [B,E*D].
    """

    def __init__(self, network: ExpertNetwork, width: int, join: Join = "unit") -> None:
        experts = len(network.branches)
        super().__init__(network, width if join == "mean" else experts * width)
        self.experts, self.join = experts, join
        self.parts = experts if join == "unit" else 1

    def forward(self, images: Tensor, experts: Literal["joined", "each", "separate"] = "joined") -> Tensor:
        """images [B,3,H,W] → features [B,feature_dim]; or, for training, the features of each expert, see ExpertNetwork."""
        features = full_precision(self.network(images, experts == "separate"))
        if experts != "joined":
            return features
        if self.join == "mean":
            return features.mean(1)
        return (F.normalize(features, dim=2) if self.join == "unit" else features).flatten(1)


def expert_backbone(
    name: str, experts: int, shared: Shared, narrow: bool = False, image_size: int | None = None
) -> ExpertBackbone:
    """Create a newly initialised backbone with `experts` experts from a backbone's name (see build_backbone).

    shared: `nothing` - the experts are whole networks (NCL). `early` - they share the stem and the first stage of a CIFAR
    ResNet, or all up to layer2 of a torchvision ResNet (RIDE). `late` - they share all but the last block, and one
    classifier takes all features (BBN). `map` - they share all convolutions; a branch is a batch norm on the last feature
    map (CIFAR ResNet) or a 1x1 convolution, batch norm and ReLU (torchvision), and the feature is the mean over the branches
    (ResLT). narrow: with `early`, the branches have 3/4 of the channels. Raises SplitError for a backbone that cannot be
    split, and as `build_backbone` does.
    """
    made = [_split(name, shared, narrow, image_size) for _ in range(experts)]
    network = ExpertNetwork(made[0].trunk, [split.branch for split in made])
    joins: dict[Shared, Join] = {"map": "mean", "late": "plain"}
    return ExpertBackbone(network, made[0].width, joins.get(shared, "unit"))


def _split(name: str, shared: Shared, narrow: bool, image_size: int | None) -> Split:
    if name in BLOCKS_PER_STAGE and shared != "nothing":
        blocks = BLOCKS_PER_STAGE[name]
        return _split_cifar(CifarResNet(blocks, NARROW_CIFAR if narrow else WIDTHS), blocks, shared)
    backbone = build_backbone(name, image_size)
    if shared == "nothing":
        return Split(nn.Identity(), backbone.network, backbone.feature_dim)
    return _split_torchvision(backbone, name, shared, narrow)


def _pool() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _split_cifar(network: CifarResNet, blocks: int, shared: Shared) -> Split:
    width: int = network.blocks[-1].get_submodule("bn2").num_features  # type: ignore[assignment]
    layers = [network.conv1, network.bn1, nn.ReLU(), *network.blocks]
    if shared == "map":
        return Split(nn.Sequential(*layers), nn.Sequential(nn.BatchNorm2d(width), *_pool()), width)
    first = 3 + blocks if shared == "early" else -1
    return Split(nn.Sequential(*layers[:first]), nn.Sequential(*layers[first:], *_pool()), width)


def _split_torchvision(backbone: Backbone, name: str, shared: Shared, narrow: bool) -> Split:
    from torchvision.models import ResNet

    network = backbone.network
    if not isinstance(network, ResNet):
        raise SplitError(
            f"{name} cannot be split into a trunk and branches; expected a CIFAR ResNet, torchvision/resnet*, "
            "torchvision/resnext* or torchvision/wide_resnet*"
        )
    stem = [network.conv1, network.bn1, network.relu, network.maxpool, network.layer1, network.layer2]
    width = backbone.feature_dim
    if shared == "map":
        extra = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        _initialise(extra)
        return Split(nn.Sequential(*stem, network.layer3, network.layer4), nn.Sequential(extra, *_pool()), width)
    if shared == "late":
        *first, last = network.layer4
        return Split(nn.Sequential(*stem, network.layer3, nn.Sequential(*first)), nn.Sequential(last, *_pool()), width)
    if narrow:
        width = _narrow(network)
    return Split(nn.Sequential(*stem), nn.Sequential(network.layer3, network.layer4, *_pool()), width)


def _narrow(network: nn.Module) -> int:
    """Replace layer3 and layer4 of a torchvision ResNet by narrower ones; returns the width of the feature."""
    resnet: Any = network
    block = type(resnet.layer3[0])
    resnet.inplanes = resnet.layer3[0].conv1.in_channels
    resnet.layer3, resnet.layer4 = (
        resnet._make_layer(block, planes, len(layer), stride=2)
        for planes, layer in zip(NARROW, (resnet.layer3, resnet.layer4), strict=True)
    )
    _initialise(resnet.layer3)
    _initialise(resnet.layer4)
    return NARROW[-1] * int(block.expansion)


def _initialise(module: nn.Module) -> None:
    """Initialise convolutions as torchvision does; batch norms start at 1 and 0 by themselves."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
