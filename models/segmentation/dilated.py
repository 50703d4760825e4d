"""Dilated backbones: an image classification network whose last stages keep the resolution of the stage before them.

ResNets of torchvision and timm: stages of stride 4, 8, 8, 8 with dilation 1, 1, 2, 4. The first convolution of a dilated
stage has half its dilation, as in mmsegmentation's `contract_dilation` and in timm's `output_stride=8`.
`timm/resnet50c` has the deep stem of mmsegmentation's ResNetV1c-50. CIFAR ResNets: the stem has stride 2 and the last
stage none, so that their stride is 4.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from models.networks.backbones import Backbone, UnknownBackboneError, build_backbone
from models.networks.resnet_cifar import WIDTHS, BasicBlock, CifarResNet, conv_bn_relu

STRIDE = 8
CIFAR_STRIDE = 4
# Layers of the deep stem: mmsegmentation's names (convolution, norm and ReLU in one sequence) and timm's.
DEEP_STEM = {
    "stem.0.": "conv1.0.", "stem.1.": "conv1.1.", "stem.3.": "conv1.3.", "stem.4.": "conv1.4.", "stem.6.": "conv1.6.",
    "stem.7.": "bn1.",
}  # fmt: skip


class DilatedBackbone(Backbone):
    """A backbone with dilated stages; `maps` returns its feature maps, the call returns the pooled feature as before.

    widths: channels of the last two stages. stride: pixels of the image per cell of the maps, in both axes.
    """

    def __init__(self, backbone: Backbone, widths: tuple[int, int], stride: int) -> None:
        super().__init__(backbone.network, backbone.feature_dim, backbone.head)
        self.widths = widths
        self.stride = stride

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [B,3,H,W] → maps of the last two stages, [B,widths[0],h,w] and [B,widths[1],h,w].

        h = ceil(H / stride), w = ceil(W / stride).
        """
        network = self.network
        if isinstance(network, CifarResNet):
            split = 2 * len(network.blocks) // len(WIDTHS)
            before: Tensor = network.blocks[:split](conv_bn_relu(images, network.conv1, network.bn1))
            last: Tensor = network.blocks[split:](before)
            return before, last
        activation = network.get_submodule("act1" if hasattr(network, "act1") else "relu")
        stem = (network.get_submodule(name) for name in ("conv1", "bn1"))
        maps = images
        for layer in (
            *stem,
            activation,
            *(network.get_submodule(n) for n in ("maxpool", "layer1", "layer2", "layer3")),
        ):
            maps = layer(maps)
        return maps, network.get_submodule("layer4")(maps)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """As `Backbone.load_weights`; also accepts a ResNetV1c of mmsegmentation, whose deep stem has other names."""
        renamed = {
            next((new + name.removeprefix(old) for old, new in DEEP_STEM.items() if name.startswith(old)), name): value
            for name, value in weights.items()
        }
        super().load_weights(renamed)


def dilated_backbone(name: str) -> DilatedBackbone:
    """Build a newly initialised dilated backbone by the name that `build_backbone` accepts.

    Supported: torchvision's ResNet, ResNeXt and Wide ResNet, timm networks of the same design (without average pooling
    or blur in their stages), CIFAR ResNets. Raises UnknownBackboneError for any other network.
    """
    backbone = build_backbone(name)
    network = backbone.network
    if isinstance(network, CifarResNet):
        _keep_last_resolution(network)
        return DilatedBackbone(backbone, (WIDTHS[-2], WIDTHS[-1]), CIFAR_STRIDE)
    if not all(hasattr(network, part) for part in ("conv1", "bn1", "maxpool", "layer3", "layer4")) or any(
        _pools(network.get_submodule(stage)) for stage in ("layer3", "layer4")
    ):
        raise UnknownBackboneError(
            f"backbone {name!r} cannot be dilated; expected a ResNet, ResNeXt or Wide ResNet of torchvision, a timm "
            "network of the same design such as timm/resnet50c, or a CIFAR ResNet"
        )
    for stage, dilation in (("layer3", 2), ("layer4", 4)):
        _dilate(network.get_submodule(stage), dilation)
    # The width of a stage is that of its last convolution.
    before = [layer for layer in network.get_submodule("layer3").modules() if isinstance(layer, nn.Conv2d)][-1]
    return DilatedBackbone(backbone, (before.out_channels, backbone.feature_dim), STRIDE)


def _pools(stage: nn.Module) -> bool:
    # A strided layer other than a convolution would still reduce the resolution.
    return any(getattr(layer, "stride", 1) not in (1, (1, 1)) for layer in stage.modules() if _is_pooling(layer))


def _is_pooling(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Conv2d) and "pool" in type(layer).__name__.lower()


def _dilate(stage: nn.Module, dilation: int) -> None:
    first = True
    for layer in stage.modules():
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
            if layer.kernel_size == (3, 3):
                step = dilation // 2 if first else dilation
                layer.dilation = layer.padding = (step, step)
                first = False


def _keep_last_resolution(network: CifarResNet) -> None:
    network.conv1.stride = (2, 2)
    last = network.blocks[2 * len(network.blocks) // len(WIDTHS) :]
    for block in last:
        if isinstance(block, BasicBlock):
            block.stride = 1
    _dilate(last, 2)
