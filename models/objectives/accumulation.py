"""One batch taken in parts, micro-batches, that each see what the whole batch left: the gradient is that of one pass.

What a sum over the batch cannot be cut into is done once: the contrast features of the whole batch are stored before any
query looks, the keys are embedded once for all parts, and L_tau is a mean over the queries of the whole batch. Only
layers that look across a batch tell parts from the whole: batch norm takes the statistics of each part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.contrast.gml import ContrastLosses


@dataclass(frozen=True)
class WholeBatch:
    """What the parts of one batch share.

    embedded: keys [K,P] with their graph. keys: the same values, a leaf, in which the parts' gradients add up. batch: its
    queries B, of all ranks. with_keys: over how many of them L_tau is a mean, a scalar.
    """

    embedded: Tensor
    keys: Tensor
    batch: int
    with_keys: Tensor

    @classmethod
    def of(cls, embedded: Tensor, batch: int, with_keys: Tensor) -> WholeBatch:
        """The whole of a batch whose keys have been embedded."""
        return cls(embedded, embedded.detach().requires_grad_(embedded.requires_grad), batch, with_keys)

    def backward(self) -> None:
        """Send what has gathered in the keys on to what embedded them, once all parts have been through."""
        if self.keys.grad is not None:
            self.embedded.backward(self.keys.grad)


def share_of_batch(losses: ContrastLosses, queries: int, batch: int, with_keys: Tensor) -> ContrastLosses:
    """Contrast losses of a part of a batch, scaled so that their mean over equal parts is the value of the batch.

    L_tau is a mean over the queries that have keys, of which parts may hold unequal numbers; the count of queries without
    keys is a sum. L_GML leaves no query out. queries: of the part. batch: queries of all parts on all ranks. with_keys:
    how many of those have keys.
    """
    scale = batch / queries
    tau_scale = (queries - losses.queries_without_keys) * scale / torch.clamp(with_keys, min=1)
    return ContrastLosses(losses.gml, losses.tau * tau_scale, losses.queries_without_keys * scale)
