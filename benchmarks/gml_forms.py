"""Equivalent implementations of L_GML + L_tau, and the test case on which benchmarks.gml_loss compares them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.contrast.gml import ClassSegments, contrast_losses
from models.contrast.gml_reference import gml_loss, other_sample_mask
from models.contrast.queues import queue_lengths

ONE_HOT, OURS, FUSED = "one-hot", "contrast_losses", "contrast_losses, fused"


class Case(NamedTuple):
    """Inputs of the losses. similarity [B,K] and log_tau [] are leaf tensors with gradients; the others: contrast_losses."""

    similarity: Tensor
    log_tau: Tensor
    runs: ClassSegments
    target: Tensor
    log_prior: Tensor
    query_ids: Tensor
    key_ids: Tensor


def make_case(batch: int, keys: int, classes: int, device: str) -> Case:
    """Make queues with class sizes as in ImageNet-LT (1280 to 5 images, k_m 2) that contain each query's image once."""
    generator = torch.Generator().manual_seed(0)
    counts = [int(1280 * (5 / 1280) ** (c / (classes - 1))) for c in range(classes)]
    lengths = torch.tensor(queue_lengths(counts, keys, 2))
    row_class = torch.repeat_interleave(torch.arange(classes), lengths)
    own_keys = torch.randperm(keys, generator=generator)[:batch]
    key_ids = -torch.arange(1, keys + 1)
    key_ids[own_keys] = torch.arange(batch)
    features = F.normalize(torch.randn(batch + keys, 32, generator=generator), dim=1)
    log_prior = (torch.tensor(counts) / sum(counts)).log()
    starts = lengths.cumsum(0) - lengths
    runs = ClassSegments(row_class.to(device), starts.to(device), lengths.to(device), int(lengths.max()))
    return Case(
        (features[:batch] @ features[batch:].T).to(device).requires_grad_(),
        torch.tensor(0.1, device=device).log().requires_grad_(),
        runs,
        row_class[own_keys].to(device),
        log_prior.to(device),
        torch.arange(batch, device=device),
        key_ids.to(device),
    )


def one_hot_loss(case: Case, similarity: Tensor, tau: Tensor, weights: Tensor) -> Tensor:
    """One loss in the one-hot form. weights: [B,K], 1 includes a pair."""
    exponent = similarity / tau
    peak = exponent.amax(1, keepdim=True).detach()
    one_hot = F.one_hot(case.runs.row_class, len(case.log_prior)).to(similarity.dtype)
    mean = ((exponent - peak).exp() * weights) @ one_hot / (weights @ one_hot)
    return F.cross_entropy(mean.log() + peak + case.log_prior, case.target)


def one_hot(case: Case) -> tuple[Tensor, Tensor]:
    weights = (case.query_ids[:, None] != case.key_ids[None, :]).to(case.similarity.dtype)
    tau = case.log_tau.exp()
    gml = one_hot_loss(case, case.similarity, tau.detach(), torch.ones_like(weights))
    return gml, one_hot_loss(case, case.similarity.detach(), tau, weights)


def lean_one_hot(case: Case) -> tuple[Tensor, Tensor]:
    one_hot = F.one_hot(case.runs.row_class, len(case.log_prior)).float()
    own = case.query_ids[:, None] == case.key_ids[None, :]
    counts = case.runs.lengths.float().expand(len(case.target), -1)
    other_counts = counts.scatter_add(1, case.target[:, None], -own.sum(1, keepdim=True).float())

    def loss(exponent: Tensor, counts: Tensor, excluded: Tensor | None) -> Tensor:
        peak = exponent.amax(1, keepdim=True).detach()
        mass = (exponent - peak).exp()
        mass = mass if excluded is None else mass.masked_fill(excluded, 0.0)
        return F.cross_entropy((mass @ one_hot / counts).log() + peak + case.log_prior, case.target)

    tau = case.log_tau.exp()
    return loss(case.similarity / tau.detach(), counts, None), loss(case.similarity.detach() / tau, other_counts, own)


def reference(case: Case) -> tuple[Tensor, Tensor]:
    tau, mask = case.log_tau.exp(), other_sample_mask(case.query_ids, case.key_ids)
    classes = case.runs.row_class
    gml = gml_loss(case.similarity, classes, case.target, case.log_prior, tau.detach())
    return gml, gml_loss(case.similarity.detach(), classes, case.target, case.log_prior, tau, mask=mask)


def ours(case: Case, fused: bool = False) -> tuple[Tensor, Tensor]:
    losses = contrast_losses(
        case.similarity, case.runs, case.target, case.log_prior, case.log_tau.exp(),
        query_ids=case.query_ids, key_ids=case.key_ids, fused=fused,
    )  # fmt: skip
    return losses.gml, losses.tau


Form = Callable[[Case], tuple[Tensor, Tensor]]
FORMS: dict[str, Form] = {
    ONE_HOT: one_hot,
    "lean one-hot": lean_one_hot,
    "gml_loss twice": reference,
    OURS: ours,
    FUSED: functools.partial(ours, fused=True),
}


def step(form: Form, case: Case) -> tuple[Tensor, Tensor]:
    case.similarity.grad = case.log_tau.grad = None
    gml, tau = form(case)
    (gml + tau).backward()
    return gml.detach(), tau.detach()


def check(form: Form, case: Case, expected: list[Tensor]) -> None:
    """Raise AssertionError when a loss or gradient deviates by more than the rounding of reordered float32 sums."""
    actual = [*step(form, case), case.similarity.grad, case.log_tau.grad]
    for name, a, b in zip(["L_GML", "L_tau", "d/dsimilarity", "d/dlog tau"], actual, expected, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error < 1e-4:
            raise AssertionError(f"{name} differs by {error:.1e} of its largest value")
