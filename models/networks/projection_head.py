"""Projection head of Eq. 7: maps features to unit vectors for the comparison of query and contrast features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.autocast import full_precision


class ProjectionHead(nn.Module):
    """Projection head: linear, BatchNorm, ReLU, linear, L2 normalisation.

    Query and key each have one; both are differentiable.
    """

    def __init__(self, feature_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(feature_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        """features [N,D] → unit vectors [N,out_dim]. Under autocast only the two linear layers use the lower precision."""
        return F.normalize(self.unscaled(features), dim=1)

    def unscaled(self, features: Tensor) -> Tensor:
        """features [N,D] → vectors [N,out_dim] before the L2 normalisation."""
        first, norm, activation, last = self.layers
        hidden = activation(norm(full_precision(first(features))))
        return full_precision(last(hidden))
