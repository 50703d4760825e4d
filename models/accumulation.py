"""One batch taken in parts, micro-batches, that each see what the whole batch left: the gradient is that of one pass.

What a sum over the batch cannot be cut into is done once: the contrast features of the whole batch are stored before any
query looks, the keys are embedded once for all parts, and L_tau is a mean over the queries of the whole batch. Only
layers that look across a batch tell parts from the whole: batch norm takes the statistics of each part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WholeBatch:
    """What the parts of one batch share.

    embedded: keys [K,P] with their graph. keys: the same values, a leaf, in which the parts' gradients add up. batch: its
    samples B. with_keys: over how many of its queries L_tau is a mean, a scalar.
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

    def tau_share(self, samples: int, without_keys: Tensor) -> Tensor:
        """By what a part's mean over its own queries is multiplied, so that the mean over parts is that of the batch.

        samples: of the part; without_keys: how many of them L_tau left out.
        """
        return (samples - without_keys) * (self.batch / samples) / torch.clamp(self.with_keys, min=1)

    def count_share(self, samples: int) -> float:
        """By what a count in a part is multiplied, so that the mean over parts is the count in the batch."""
        return self.batch / samples
