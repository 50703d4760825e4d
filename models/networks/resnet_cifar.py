"""CIFAR ResNets (He et al. 2016, section 4.2) with the parameter-free shortcut, as used in the long-tail literature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS_PER_STAGE = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Residual block: conv-BN-ReLU-conv-BN plus shortcut A (every second pixel, channels padded with zeros on both sides)."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.padding = (planes - in_planes) // 2

    def forward(self, x: Tensor) -> Tensor:
        """x [B,in,H,W] → [B,planes,H/stride,W/stride]."""
        out = conv_bn_relu(x, self.conv1, self.bn1)
        if self.stride != 1 or self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return conv_bn_relu(out, self.conv2, self.bn2, shortcut=x)


class CifarResNet(nn.Module):
    """CIFAR ResNet: 3x3 stem of 16 channels, stages of 16/32/64 channels; the 64-d feature is the pooled last ReLU output.

    widths: channels of the three stages.
    """

    feature_dim = WIDTHS[-1]

    def __init__(self, blocks: int, widths: tuple[int, int, int] = WIDTHS) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        layers: list[nn.Module] = []
        planes = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(BasicBlock(planes, width, 2 if stage > 0 and block == 0 else 1))
                planes = width
        self.blocks = nn.Sequential(*layers)
        self.pool = MeanOverPositions()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [B,3,H,W] → features [B,widths[-1]], non-negative and unnormalised."""
        features: Tensor = self.pool(self.blocks(conv_bn_relu(x, self.conv1, self.bn1)))
        return features


class MeanOverPositions(nn.Module):
    """Global average pooling: maps [B,D,H,W] → [B,D]."""

    def forward(self, maps: Tensor) -> Tensor:
        """The mean over the positions."""
        return maps.mean(dim=(2, 3))


BatchNorm = nn.modules.batchnorm._BatchNorm  # BatchNorm2d and other subclasses, equal in evaluation mode


def conv_bn_relu(x: Tensor, conv: nn.Conv2d, norm: BatchNorm, shortcut: Tensor | None = None) -> Tensor:
    """relu(norm(conv(x)) + shortcut): x [B,in,H,W]; shortcut: the result's shape or None. conv has no bias.

    Bit-identical to the four operations in training; equal up to rounding if frozen on the CPU.
    """
    out = _folded(x, conv, norm) if _frozen_on_cpu(x, norm) else norm(conv(x))
    if shortcut is not None:
        out = out.add_(shortcut)
    return F.relu(out, inplace=True)


def _frozen_on_cpu(x: Tensor, norm: BatchNorm) -> bool:
    # A compiled or exported graph keeps the norm, because its compiler folds it.
    return not (torch.is_grad_enabled() or norm.training or torch.compiler.is_compiling()) and x.device.type == "cpu"


def _folded(x: Tensor, conv: nn.Conv2d, norm: BatchNorm) -> Tensor:
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    bias = norm.bias - mean * scale
    return F.conv2d(
        x, conv.weight * scale[:, None, None, None], bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )
