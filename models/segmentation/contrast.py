"""L_GML on sampled cells of a feature map: class-wise queues of sampled contrast cells, two projection heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.contrast.gml import contrast_losses
from models.contrast.memories import counter_random
from models.contrast.queues import ClassQueues
from models.distributed import gather_batch, rank
from models.networks.autocast import without_autocast
from models.networks.projection_head import ProjectionHead
from models.segmentation.cells import cell_labels, choose_keys, choose_queries


class CellContrast(nn.Module):
    """L_GML (Eq. 10) of sampled query cells against class-wise queues of sampled contrast cells.

    The queues store the contrast encoder's features of the chosen cells before the loss is computed, and the key head
    embeds the whole queue at every step, as for images. The sample id of a cell is the index of its image. tau_g is
    fixed: the paper trains it for images only.

    counts: training pixels of each class; they set the lengths of the queues (Eq. 5). feature_dim, key_dim: D of the
    student and of the contrast encoder. queries: cells compared at every step on this rank. keys, keys_per_class: cells
    stored at every step on this rank, at most, and of them at most keys_per_class of a class in an image.
    """

    steps: Tensor

    def __init__(
        self,
        feature_dim: int,
        key_dim: int,
        counts: Sequence[int],
        *,
        tau_g: float = 0.07,
        prior_strength: float = 1.0,
        queue_total: int = 8192,
        queue_minimum: int = 27,
        queries: int = 4096,
        keys: int = 512,
        keys_per_class: int = 4,
        projection_hidden: int | None = None,
        projection_dim: int = 256,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.tau_g, self.prior_strength = tau_g, prior_strength
        self.queries, self.keys, self.keys_per_class = queries, keys, keys_per_class
        self.query_head = ProjectionHead(feature_dim, projection_hidden or feature_dim, projection_dim)
        if key_dim == feature_dim:
            self.key_head = copy.deepcopy(self.query_head)
        else:
            self.key_head = ProjectionHead(key_dim, projection_hidden or key_dim, projection_dim)
        self.queues = ClassQueues(counts, queue_total, queue_minimum, key_dim, generator)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of counter_random

    def forward(
        self, features: Tensor, contrast_features: Tensor, labels: Tensor, sample_ids: Tensor, log_prior: Tensor
    ) -> Tensor:
        """L_GML, a scalar; 0 if no cell has a class.

        features: [B,D,h,w] of the student, with gradient. contrast_features: [B,E,h,w] of the contrast encoder for the
        same images, without gradient. labels: [B,H,W], classes or 255. sample_ids: [B] int64, indices of the images.
        log_prior: [C].
        """
        own = cell_labels(labels, *features.shape[2:])
        cells = own.numel()
        random = counter_random(self.steps, (3, cells), 3 * cells * rank())
        self.steps.add_(1)
        self._store(contrast_features.detach(), own, sample_ids, random[:2])
        chosen = choose_queries(own, self.queries, random[2])
        query = self.query_head(_rows(features)[chosen.rows])
        keys = self.key_head(self.queues.features)
        with without_autocast(query):
            similarity = query @ keys.T
        losses = contrast_losses(
            similarity,
            self.queues,
            # The label of an ignored cell is no class; its row has weight 0.
            own.flatten()[chosen.rows].long().masked_fill(~chosen.valid, 0),
            log_prior,
            self.tau_g,
            self.prior_strength,
            query_ids=sample_ids[chosen.rows // own[0].numel()],
            key_ids=self.queues.sample_ids,
        )
        return losses.gml * chosen.valid[0]

    @torch.no_grad()
    def _store(self, features: Tensor, own: Tensor, sample_ids: Tensor, random: Tensor) -> None:
        chosen = choose_keys(own, self.keys, self.keys_per_class, random)
        labels = own.flatten()[chosen.rows].long().masked_fill(~chosen.valid, 0)
        ids = sample_ids[chosen.rows // own[0].numel()]
        # Every rank stores the cells of all ranks in rank order, so that the queues stay equal without a broadcast.
        self.queues.enqueue(*map(gather_batch, (_rows(features)[chosen.rows], labels, ids, chosen.valid)))


def _rows(features: Tensor) -> Tensor:
    """Features of the cells: [B,D,h,w] → [B*h*w,D]."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)
