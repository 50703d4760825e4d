"""Contrastive representation distillation, CRD (Tian et al. 2020): the student's feature of an image against the teacher's.

Anchors of the student are scored against a memory of teacher embeddings, and the reverse: x_j = exp(v . m_j / T) / Z for
the own sample (j = 0) and K negatives of other classes, c = K / N, and
loss = -mean_i [log(x_0 / (x_0 + c)) + sum_j log(c / (x_j + c))]. Z is N times the mean of exp(v . m / T) of the first
batch, and constant afterwards (as in the official code).

The official code gathers two tensors B x (K+1) x P. Here one matrix product scores all N rows, and B x (K+1) scores are
gathered. Scores stay in log space, so that exp(1 / T) does not overflow at any temperature.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.contrast.memories import counter_random
from models.contrast.terms import ContrastInputs, ContrastTerm
from models.distributed import gather_batch, rank, rank_count
from models.networks.autocast import full_precision, without_autocast

EPSILON = 1e-7  # added to each denominator, as in the official code


class Embedding(nn.Module):
    """Linear layer and L2 normalisation: features [B,D] → unit vectors [B,P]."""

    def __init__(self, feature_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        """features [B,D] → unit vectors [B,P]; under autocast only the linear layer uses the lower precision."""
        return F.normalize(full_precision(self.linear(features)), dim=1)


def noise_contrastive_losses(exponent: Tensor, log_z: Tensor, samples: int) -> Tensor:
    """CRD loss of each anchor in one direction: [B].

    exponent: [B,K+1], v . m / T, the own sample first; log_z: [] log Z; samples: number N of rows in the memory.
    """
    negatives = exponent.shape[1] - 1
    share = negatives / samples
    limit = math.log(share + EPSILON)
    # log(x + c) = log c + log(1 + exp d): exp(exponent) overflows float32 at temperatures below 0.0113. On the CPU exp and log
    # are vectorised and log1p is not, so that logaddexp and softplus take twice as long as this sum.
    d = exponent - (log_z + limit)
    distance = d.abs()
    log_total = (d + distance).sum(1) / 2 + (1 + (-distance).exp()).log().sum(1)
    return log_total - (exponent[:, 0] - log_z) + ((negatives + 1) * limit - negatives * math.log(share))


class CRD(ContrastTerm):
    """CRD with one memory row per training image for the student and for the teacher.

    The query is the student's feature of the classifier view, the key the teacher's. Both embeddings are trained. The
    negatives are drawn with replacement, uniformly over the images of the other classes, as a function of the step; see
    `draw` for what the anchors share (the official code draws for each anchor, without replacement if there are at least
    K such images). Memory rows of the batch become normalise(rate * old + (1 - rate) * new) after
    the step.

    Buffers: memory [2,N,P] (student, teacher), log_z [2] (inf before the first step), order [N] int64 (images sorted by
    class), starts, lengths [C] int64, draws [] int64. sample_ids are the rows 0..N-1.
    """

    encoder = "teacher"
    on_classifier_view = True
    uses = ("key",)
    memory: Tensor
    log_z: Tensor
    order: Tensor
    starts: Tensor
    lengths: Tensor
    draws: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        labels: Tensor,
        *,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        rate: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        """labels: int64 [N], the class of each training image. Raises ValueError if there is only one class or K < 1."""
        super().__init__()
        if negatives < 1:
            raise ValueError(f"negatives K is {negatives}; expected at least 1")
        lengths = torch.bincount(labels)
        if int((lengths > 0).sum()) < 2:
            raise ValueError("labels contain one class only; CRD needs images of another class as negatives")
        self.student_head, self.teacher_head = Embedding(student_dim, dim), Embedding(teacher_dim, dim)
        self.negatives, self.temperature, self.rate = negatives, temperature, rate
        bound = 1 / math.sqrt(dim / 3)
        self.register_buffer("memory", (torch.rand(2, len(labels), dim, generator=generator) * 2 - 1) * bound)
        self.register_buffer("log_z", torch.full((2,), torch.inf))
        self.register_buffer("order", labels.argsort(stable=True))
        self.register_buffer("starts", lengths.cumsum(0) - lengths)
        self.register_buffer("lengths", lengths)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self._step: tuple[Tensor, Tensor] | None = None

    def forward(self, inputs: ContrastInputs) -> dict[str, Tensor]:
        """Loss of a batch, the sum of both directions; see ContrastTerm."""
        self.check(inputs)
        student, teacher = self.student_head(inputs.queries[0]), self.teacher_head(inputs.key)
        rows = torch.cat([inputs.sample_ids[:, None], self.draw(inputs.target)], 1)
        self._step = gather_batch(torch.stack([student, teacher], 1).detach()), gather_batch(inputs.sample_ids)
        return {"loss": self.losses(student, teacher, rows).mean()}

    def draw(self, target: Tensor) -> Tensor:
        """Images of other classes for each anchor: target [B] → int64 [B,K].

        K random numbers are shared by the anchors, and each anchor turns them by one of its own: u_ik = (s_k + t_i) mod 1. Each
        draw is uniform and any two of the B x K are independent, so that mean and variance of the loss are those of
        independent draws. Three are not: the draws of two anchors of a class differ by one turn, the same for all K. A step
        draws K + B numbers in place of B x K.
        """
        shared = counter_random(self.draws, (self.negatives,))
        turn = counter_random(self.draws, (len(target),), offset=self.negatives + rank() * len(target))
        own = self.lengths[target][:, None]
        # A number below 2**31 times the images of other classes, over 2**31: below that number of images.
        position = (shared + turn[:, None]).bitwise_and_(2**31 - 1).mul_(len(self.order) - own).bitwise_right_shift_(31)
        position += own * (position >= self.starts[target][:, None])
        return self.order.index_select(0, position.flatten()).view_as(position)

    def losses(self, student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
        """Loss of each sample, [B]: student and teacher embeddings [B,P], rows int64 [B,K+1], the own sample first."""
        samples = self.memory.shape[1]
        total = torch.zeros_like(student[:, 0])
        # The student's anchors are compared with the teacher's memory (row 1), and the reverse.
        for direction, (anchors, memory) in enumerate(((student, self.memory[1]), (teacher, self.memory[0]))):
            with without_autocast(anchors):
                exponent = (anchors / self.temperature @ memory.to(anchors.dtype).T).gather(1, rows)
            with torch.no_grad():
                local = exponent.flatten().logsumexp(0) - math.log(exponent.numel())
                measured = gather_batch(local[None]).logsumexp(0) - math.log(rank_count()) + math.log(samples)
                log_z = torch.where(self.log_z[direction].isinf(), measured, self.log_z[direction])
                self.log_z[direction] = log_z
            total = total + noise_contrastive_losses(exponent, log_z, samples)
        return total

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the memory rows of the step. The backward pass reads the memory, so it must not change before."""
        if self._step is None:
            return
        new, rows = self._step
        # An indexed write has no defined order for equal rows, so all copies of an image write the first one's feature.
        new = new[(rows[:, None] == rows).to(torch.int8).argmax(1)]
        old = self.memory[:, rows]
        moved = self.rate * old + (1 - self.rate) * new.transpose(0, 1).to(old.dtype)
        self.memory[:, rows] = F.normalize(moved, dim=2)
        self.draws.add_(1)
        self._step = None
