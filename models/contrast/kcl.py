"""K-positive contrastive losses: KCL (Kang et al. 2021) and, with fixed targets of the classes, TSC (Li et al. 2022).

KCL: loss_i = mean over {own key, up to k keys of the same class in the queue} of -log softmax over {own key, whole queue}.
TSC adds C fixed unit vectors, spread evenly over the sphere, to the candidates; that of the own class is one more positive, of
weight `target_weight`. The mean divides by the number of positives, the target included (authors' code).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.contrast.memories import FifoQueue, counter_random
from models.contrast.terms import ContrastInputs, ContrastTerm, project
from models.distributed import gather_batch
from models.networks.autocast import without_autocast

TARGET_STEPS, TARGET_RATE = 200, 0.03  # of the spreading of the targets; the authors have 10,000 steps of Adam
CENTRE_MOMENTUM = 0.9  # of the running class centres (TSC's code)


def k_positive_losses(
    own: Tensor,
    exponent: Tensor,
    same: Tensor,
    order: Tensor,
    positives: int,
    targets: Tensor | None = None,
    target: Tensor | None = None,
    target_weight: float = 0.0,
) -> Tensor:
    """KCL or TSC loss of each query: [B].

    own: [B], cosine of query and own key divided by the temperature; exponent: [B,K], the same for the keys of the
    queue; same: [B,K] bool, True for keys of the query's class; order: [K] float in [0, 1); of the keys of the query's
    class, the `positives` (k) with the largest order are positives. Keys of the class beyond those remain in the
    denominator only. targets: [B,C], the same for the targets, of which column target [B] int64 is that of the own class.
    """
    chosen = min(positives, exponent.shape[1])
    # A key of another class gets -1, below every order.
    rank, columns = torch.where(same, order, -1.0).topk(chosen, dim=1)
    valid = rank >= 0
    total = own + torch.where(valid, exponent.gather(1, columns), 0.0).sum(1)
    number = (1 + valid.sum(1)).to(exponent.dtype)
    if targets is None or target is None:
        return torch.cat([own[:, None], exponent], 1).logsumexp(1) - total / number
    total = total + target_weight * targets.gather(1, target[:, None]).squeeze(1)
    log_sum = torch.cat([own[:, None], exponent, targets], 1).logsumexp(1)
    return ((number + target_weight) * log_sum - total) / (number + 1)


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
        return {"loss": self.losses(query, inputs.target, own, exponent, same, order).mean()}

    def losses(
        self,
        query: Tensor,  # noqa: ARG002 - for TSC
        target: Tensor,  # noqa: ARG002 - for TSC
        own: Tensor,
        exponent: Tensor,
        same: Tensor,
        order: Tensor,
    ) -> Tensor:
        """Loss of each query [B,P] of the classes target [B]; the others as in `k_positive_losses`."""
        return k_positive_losses(own, exponent, same, order, self.positives)

    def after_step(self) -> None:
        """Store the keys of the step. The backward pass reads the queue, so it must not change before."""
        if self._step is not None:
            self.queue.enqueue(*self._step)
            self.draws.add_(1)
            self._step = None


def spread_targets(targets: Tensor, temperature: float, steps: int = TARGET_STEPS) -> Tensor:
    """Unit vectors [C,P] after `steps` of gradient descent on sum_i log sum_{j != i} exp(t_i . t_j / temperature).

    For C <= P + 1 the optimum is a simplex: all cosines are -1 / (C - 1). With j = i, as in the authors' code, it is the same,
    but the gradient nearly vanishes. A step takes C² P multiplications.
    """
    for step in range(steps):
        with torch.enable_grad():
            free = targets.detach().requires_grad_()
            others = (free @ free.T / temperature).fill_diagonal_(-torch.inf)
            (gradient,) = torch.autograd.grad(others.logsumexp(1).sum(), free)
        targets = F.normalize(targets.detach() - TARGET_RATE * (1 - step / steps) * gradient, dim=1)
    return targets


class TargetedContrast(KPositiveContrast):
    """TSC: KCL with one fixed target for each class.

    Classes and targets are matched by the Hungarian algorithm (scipy) at the start of each epoch, so that a captured step
    stays valid; the authors' code matches them in each step. The match has the largest sum of the cosines of targets and
    running class centres, the mean directions of the queries. In the first epoch, class c has target c.

    Buffers: targets, centres [C,P], matched [C] int64 (class → row of targets), epoch [] int64.
    """

    targets: Tensor
    centres: Tensor
    matched: Tensor
    epoch: Tensor

    def __init__(
        self,
        head: nn.Module,
        queue: FifoQueue,
        classes: int,
        temperature: float = 0.07,
        positives: int = 6,
        target_weight: float = 0.2,
    ) -> None:
        super().__init__(head, queue, temperature, positives)
        self.target_weight = target_weight
        self.register_buffer("targets", F.normalize(torch.randn(classes, queue.features.shape[1]), dim=1))
        self.register_buffer("centres", torch.zeros_like(self.targets))
        self.register_buffer("matched", torch.arange(classes))
        self.register_buffer("epoch", torch.full((), -1))

    @torch.no_grad()
    def begin_epoch(self, epoch: int, epochs: int) -> None:  # noqa: ARG002 - the interface of ContrastTerm
        """Spread the targets before the first epoch; match classes and targets. Again on resume, without effect."""
        if int(self.epoch) == epoch:
            return
        if int(self.epoch) < 0:
            self.targets.copy_(spread_targets(self.targets.float().cpu(), self.temperature))
        else:
            from scipy.optimize import linear_sum_assignment  # in the extra `pipeline`

            cosines = (self.centres @ self.targets.T).double().cpu().numpy()
            self.matched.copy_(torch.from_numpy(linear_sum_assignment(cosines, maximize=True)[1]))
        self.epoch.fill_(epoch)

    def losses(
        self, query: Tensor, target: Tensor, own: Tensor, exponent: Tensor, same: Tensor, order: Tensor
    ) -> Tensor:
        """See KPositiveContrast; also moves the centres of the batch's classes."""
        with without_autocast(query):
            targets = query @ self.targets.to(query.dtype).T / self.temperature
        self._move_centres(gather_batch(query.detach()), gather_batch(target))
        return k_positive_losses(
            own, exponent, same, order, self.positives, targets, self.matched[target], self.target_weight
        )

    @torch.no_grad()
    def _move_centres(self, query: Tensor, target: Tensor) -> None:
        sums = torch.zeros_like(self.centres).index_add_(0, target, query.to(self.centres.dtype))
        moved = CENTRE_MOMENTUM * self.centres + (1 - CENTRE_MOMENTUM) * F.normalize(sums, dim=1)
        present = torch.zeros_like(self.matched).index_add_(0, target, torch.ones_like(target)) > 0
        self.centres.copy_(torch.where(present[:, None], F.normalize(moved, dim=1), self.centres))
