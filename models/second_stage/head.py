"""Linear head of a second stage, in the place of the cosine classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.autocast import full_precision, without_autocast
from models.second_stage.disalign import gated_logits


class LinearHead(nn.Module):
    """Logits of features [B,D]: W·u + b of the unit feature u [B,C].

    weight: [C,D]; bias: [C]. centred: the buffer `centre` [D] is subtracted before the feature is scaled to length 1 (nearest
    class mean). gated: the logits are aligned by `gated_logits` (DisAlign) with gate_weight [D], gate_bias [1], gain [C] and
    offset [C]. All values are 0 until they are set or loaded.
    """

    centre: Tensor | None
    gate_weight: nn.Parameter | None

    def __init__(self, feature_dim: int, classes: int, *, centred: bool = False, gated: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, feature_dim))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.register_buffer("centre", torch.zeros(feature_dim) if centred else None)
        self.register_parameter("gate_weight", nn.Parameter(torch.zeros(feature_dim)) if gated else None)
        if gated:
            self.gate_bias = nn.Parameter(torch.zeros(1))
            self.gain = nn.Parameter(torch.zeros(classes))
            self.offset = nn.Parameter(torch.zeros(classes))

    @property
    def scale(self) -> float:
        """Largest change of a logit when the cosine of a feature with each row of `weight` changes by at most 1."""
        largest = self.weight.detach().norm(dim=1).max()
        if self.gate_weight is not None:
            largest = largest * (1 + self.gain.detach().clamp(min=0).max())
        return float(largest)

    def forward(self, features: Tensor) -> Tensor:
        """features [B,D] → logits [B,C]; computed in float32 also under autocast."""
        with without_autocast(features):
            outputs = full_precision(features)
            unit = F.normalize(outputs if self.centre is None else outputs - self.centre, dim=1)
            logits = F.linear(unit, self.weight, self.bias)
            if self.gate_weight is None:
                return logits
            return gated_logits(logits, unit, self.gate_weight, self.gate_bias, self.gain, self.offset)


def linear_head(weight: Tensor, bias: Tensor, centre: Tensor | None = None) -> LinearHead:
    """Head in eval mode with these values, float32 on the CPU."""
    head = LinearHead(weight.shape[1], weight.shape[0], centred=centre is not None)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
        if centre is not None and head.centre is not None:
            head.centre.copy_(centre)
    return head.eval()
