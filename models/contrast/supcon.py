"""Supervised contrastive losses within a batch: SupCon and balanced contrastive learning (BCL).

SupCon (Khosla et al. 2020, L_out): loss_i = log sum_{j != i} exp(s_ij) - mean_{P(i)} s_ij, with s_ij the cosine divided
by the temperature and P(i) the other rows of the class of i.

BCL (Zhu et al. 2022): one centre per class is added to the rows, and each class has the same weight in the sum:
loss_i = log sum_c 1/N'_c sum_{j in c, j != i} exp(s_ij) - mean_{P(i)} s_ij. N_c is the number of rows of class c with its
centre; N'_c is N_c - 1 for the class of i and N_c for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.contrast.terms import ContrastInputs, ContrastTerm, gather_views, own_columns, project
from models.distributed import gather_batch
from models.networks.autocast import without_autocast


def supervised_losses(
    exponent: Tensor, same: Tensor, own: Tensor | None = None, log_weight: Tensor | None = None
) -> Tensor:
    """SupCon loss of each anchor: [N] (L_out, without a factor for the temperature).

    exponent: [N,M], cosines of anchors and candidates divided by the temperature; same: [N,M] bool, True for candidates
    of the anchor's class; own: [N] int64, the column of the anchor itself, which is excluded, or None; log_weight:
    broadcastable to [N,M], log of the weight of each candidate in the denominator. An anchor without a positive
    candidate has the loss 0.
    """
    weighted = exponent if log_weight is None else exponent + log_weight
    if own is not None:
        # Finite, because a row without another candidate would have the gradient NaN at -inf.
        weighted = weighted.scatter(1, own[:, None], torch.finfo(exponent.dtype).min)
        same = same.scatter(1, own[:, None], False)
    positives = same.sum(1)
    mean = torch.where(same, exponent, 0.0).sum(1) / positives.clamp(min=1)
    return torch.where(positives > 0, weighted.logsumexp(1) - mean, 0.0)


def balanced_losses(exponent: Tensor, target: Tensor, candidate_class: Tensor, own: Tensor, counts: Tensor) -> Tensor:
    """BCL loss of each anchor: [N].

    exponent: [N,M], cosines of anchors and candidates (rows of the batch, then the class centres) divided by the
    temperature; target: [N] and candidate_class: [M] int64; own: [N] int64, the column of the anchor itself; counts:
    [C], number N_c of candidates of each class, the centre included.
    """
    same = target[:, None] == candidate_class
    log_counts = counts.to(exponent.dtype).log()
    own_class = (counts[target] - 1).to(exponent.dtype).log()
    log_weight = -torch.where(same, own_class[:, None], log_counts[candidate_class])
    return supervised_losses(exponent, same, own, log_weight)


class SupCon(ContrastTerm):
    """SupCon on two views; the loss is the mean over the 2B rows.

    head: projection head, features [N,D] → unit vectors [N,P]. base_temperature: the official code multiplies the loss
    by temperature / 0.07 (its base_temperature); None: no factor. The candidates are the rows of all ranks.
    """

    views = 2

    def __init__(self, head: nn.Module, temperature: float, base_temperature: float | None = None) -> None:
        super().__init__()
        self.head = head
        self.temperature = temperature
        self.factor = 1.0 if base_temperature is None else temperature / base_temperature

    def forward(self, inputs: ContrastInputs) -> dict[str, Tensor]:
        """Loss of a batch; see ContrastTerm."""
        self.check(inputs)
        projected = project(self.head, inputs.queries)
        candidates = gather_views(projected)
        anchors = projected.flatten(0, 1)
        with without_autocast(anchors):
            exponent = anchors @ candidates.T / self.temperature
        same = inputs.target.repeat(self.views)[:, None] == gather_batch(inputs.target).repeat(self.views)
        own = own_columns(projected)
        return {"loss": self.factor * supervised_losses(exponent, same, own).mean()}


class BalancedContrast(ContrastTerm):
    """BCL on two views and one centre per class; the loss is the mean over the 2B rows of the batch.

    head: projection head of the features, centre_head: of the class weights; both [N,D] → unit vectors [N,P]. A class
    without an image in the batch has its centre only.
    """

    views = 2
    uses = ("class_weight",)

    def __init__(self, head: nn.Module, centre_head: nn.Module, temperature: float) -> None:
        super().__init__()
        self.head, self.centre_head = head, centre_head
        self.temperature = temperature

    def batch_modules(self) -> list[nn.Module]:
        """The head of the features. The input of the other one is the same on every rank: all class weights."""
        return [self.head]

    def forward(self, inputs: ContrastInputs) -> dict[str, Tensor]:
        """Loss of a batch; see ContrastTerm."""
        self.check(inputs)
        projected = project(self.head, inputs.queries)
        centres = self.centre_head(inputs.class_weight)
        anchors, classes = projected.flatten(0, 1), torch.arange(len(centres), device=projected.device)
        with without_autocast(anchors):
            exponent = anchors @ torch.cat([gather_views(projected), centres]).T / self.temperature
        candidate_class = torch.cat([gather_batch(inputs.target).repeat(self.views), classes])
        counts = torch.zeros_like(classes).index_add(0, candidate_class, torch.ones_like(candidate_class))
        own = own_columns(projected)
        losses = balanced_losses(exponent, inputs.target.repeat(self.views), candidate_class, own, counts)
        return {"loss": losses.mean()}
