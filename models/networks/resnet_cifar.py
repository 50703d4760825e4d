"""CIFAR ResNets (He et al. 2016, section 4.2) with the parameter-free shortcut, as used in the long-tail literature."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.conv_bn_relu import conv_bn_relu

BLOCKS_PER_STAGE = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
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
    """CIFAR ResNet: 3x3 stem of 16 channels, stages of 16/32/64 channels; the 64-d feature is the pooled last ReLU output."""

    feature_dim = WIDTHS[-1]

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        layers: list[nn.Module] = []
        planes = WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            for block in range(blocks):
                layers.append(BasicBlock(planes, width, 2 if stage > 0 and block == 0 else 1))
                planes = width
        self.blocks = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [B,3,H,W] → features [B,64], non-negative and unnormalised."""
        maps: Tensor = self.blocks(conv_bn_relu(x, self.conv1, self.bn1))
        return maps.mean(dim=(2, 3))
