"""Gradient accumulation over micro-batches that equals one pass over the whole batch.

Some quantities cannot be split into a sum over micro-batches, so they are computed once: the contrast features of the
whole batch are stored before the first query is compared, the keys are embedded once for all micro-batches, and L_tau
is a mean over the queries of the whole batch. Only batch norm differs from one pass: it uses the statistics of each
micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.contrast.gml import ContrastLosses


@dataclass(frozen=True)
class WholeBatch:
    """Values that the micro-batches of one batch share.

    embedded: keys [K,P] with their autograd graph. keys: the same values as a leaf tensor, which accumulates the
    gradients of the micro-batches. batch: number of queries B on all ranks. with_keys: number of queries that L_tau
    averages over, a scalar tensor.
    """

    embedded: Tensor
    keys: Tensor
    batch: int
    with_keys: Tensor

    @classmethod
    def of(cls, embedded: Tensor, batch: int, with_keys: Tensor) -> WholeBatch:
        """Create the shared values of a batch from its embedded keys."""
        return cls(embedded, embedded.detach().requires_grad_(embedded.requires_grad), batch, with_keys)

    def backward(self) -> None:
        """Backpropagate the gradient accumulated in `keys` through the embedding; call it after all micro-batches."""
        if self.keys.grad is not None:
            self.embedded.backward(self.keys.grad)


def share_of_batch(losses: ContrastLosses, queries: int, batch: int, with_keys: Tensor) -> ContrastLosses:
    """Scale the contrast losses of a micro-batch so that their mean over equal micro-batches is that of the whole batch.

    L_tau is a mean over the queries with keys, whose number can differ between micro-batches. The number of queries
    without keys is a sum. L_GML excludes no query. queries: of the micro-batch. batch: queries of all micro-batches on
    all ranks. with_keys: number of those with keys.
    """
    scale = batch / queries
    tau_scale = (queries - losses.queries_without_keys) * scale / torch.clamp(with_keys, min=1)
    return ContrastLosses(losses.gml, losses.tau * tau_scale, losses.queries_without_keys * scale)
