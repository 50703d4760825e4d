"""K-positive contrastive loss, KCL (Kang et al. 2021): a fixed number of positive keys for every query.

loss_i = mean over {own key, up to k keys of the same class in the queue} of -log softmax over {own key, whole queue}.
TSC (Li et al. 2022) adds one fixed target per class to the keys. It is not included: it assigns targets to classes with
the Hungarian algorithm on the host at every step, which a captured CUDA graph cannot contain.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from models.contrast.memories import FifoQueue, counter_random
from models.contrast.terms import ContrastInputs, ContrastTerm, project
from models.distributed import gather_batch
from models.networks.autocast import without_autocast


def k_positive_losses(own: Tensor, exponent: Tensor, same: Tensor, order: Tensor, positives: int) -> Tensor:
    """KCL loss of each query: [B].

    own: [B], cosine of query and own key divided by the temperature; exponent: [B,K], the same for the keys of the
    queue; same: [B,K] bool, True for keys of the query's class; order: [K] float in [0, 1); of the keys of the query's
    class, the `positives` (k) with the largest order are positives. Keys of the class beyond those remain in the
    denominator only.
    """
    chosen = min(positives, exponent.shape[1])
    # A key of another class gets -1, below every order.
    rank, columns = torch.where(same, order, -1.0).topk(chosen, dim=1)
    valid = rank >= 0
    total = own + torch.where(valid, exponent.gather(1, columns), 0.0).sum(1)
    return torch.cat([own[:, None], exponent], 1).logsumexp(1) - total / (1 + valid.sum(1))


class KPositiveContrast(ContrastTerm):
    """KCL with a momentum encoder and a queue; the positives are drawn at random among the keys of the class.

    head: projection head, features [N,D] → unit vectors [N,P]; its copy for the keys follows it with the momentum
    encoder. The draw is one order of the queue's rows per step, the same for all queries. The official code takes the
    first keys of the queue instead of random ones. The keys of a batch are stored after its step. Raises ValueError at
    the first step if the queue's total is below the batch.
    """

    encoder = "momentum"
    on_classifier_view = True
    uses = ("key",)
    draws: Tensor

    def __init__(self, head: nn.Module, queue: FifoQueue, temperature: float = 0.07, positives: int = 6) -> None:
        """positives: k >= 0, positive keys from the queue for each query. Raises ValueError for a negative number."""
        super().__init__()
        if positives < 0:
            raise ValueError(f"positives k is {positives}; expected 0 or more keys from the queue")
        self.head, self.queue = head, queue
        self.key_head = copy.deepcopy(head).requires_grad_(False)
        self.temperature, self.positives = temperature, positives
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self._step: tuple[Tensor, Tensor] | None = None

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The key head follows the query head."""
        return [(self.key_head, self.head)]

    def forward(self, inputs: ContrastInputs) -> dict[str, Tensor]:
        """Loss of a batch; see ContrastTerm."""
        self.check(inputs)
        query = project(self.head, inputs.queries)[0]
        with torch.no_grad():
            key = self.key_head(inputs.key)
        order = counter_random(self.draws, (len(self.queue.labels),)).to(query.dtype) / 2**62
        with without_autocast(query):
            own = (query * key).sum(1) / self.temperature
            exponent = query @ self.queue.features.to(query.dtype).T / self.temperature
        same = inputs.target[:, None] == self.queue.labels
        self._step = gather_batch(key), gather_batch(inputs.target)
        return {"loss": k_positive_losses(own, exponent, same, order, self.positives).mean()}

    def after_step(self) -> None:
        """Store the keys of the step. The backward pass reads the queue, so it must not change before."""
        if self._step is not None:
            self.queue.enqueue(*self._step)
            self.draws.add_(1)
            self._step = None
