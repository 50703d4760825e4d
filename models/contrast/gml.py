"""Contrast losses L_GML and L_tau of one batch in one pass; the cost does not depend on the number of classes.

With bias_k = strength * log p(c) - log n_c for a key k of class c, the softmax over classes of Eq. 4 is a softmax over
keys: sum_c p(c)^strength * s_c = sum_k exp(similarity_k / tau + bias_k). Only the score of the query's own class is
needed:

    loss = -log sigmoid(own - rest),    own  = log s_y + strength * log p(y), over the keys of the query's class,
                                        rest = log-sum-exp of similarity / tau + bias over all other keys.

L_tau excludes the query's own sample. At equal temperature it has the same `rest` as L_GML; only `own` differs. `own`
and `rest` are separate sums and are never obtained by subtraction, so there is no cancellation. Neither underflows to
log 0 at any temperature.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.contrast.fused_kernel import FLOOR, FusedSplit
from models.contrast.fused_kernel_check import kernels_are_right, kernels_may_run


class KeyRuns(NamedTuple):
    """Key rows of each class: class c has the rows starts[c] to starts[c] + lengths[c] - 1 (see ClassQueues).

    row_class: [K] int64; starts, lengths: [C] int64; longest: the largest length, a Python int, because shapes depend
    on it.
    """

    row_class: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int


class ContrastLosses(NamedTuple):
    """Scalar tensors: L_GML, L_tau, and the number of queries without a key of another sample, which L_tau excludes."""

    gml: Tensor
    tau: Tensor
    queries_without_keys: Tensor


def contrast_losses(
    similarity: Tensor,
    runs: KeyRuns,
    target: Tensor,
    log_prior: Tensor,
    temperature: Tensor | float,
    strength: float = 1.0,
    *,
    query_ids: Tensor,
    key_ids: Tensor,
    fused: bool | Literal["auto"] = "auto",
) -> ContrastLosses:
    """L_GML (Eq. 4, Eq. 10 with `strength`) and L_tau, equal to gml_reference.gml_loss without and with its mask.

    similarity: [B,K] cosines; target: [B] int64; log_prior: [C]; temperature: tau_g > 0, a number or a scalar tensor;
    query_ids [B], key_ids [K]: sample ids, int64. All keys of a sample are assumed to be rows of the sample's class.

    L_GML has a gradient with respect to the similarity only, L_tau with respect to the temperature only. L_tau excludes
    a query if its class has no key of another sample; L_GML excludes a query if its class has no key. Shapes are static
    and nothing is copied to the host. fused: True for the CUDA kernels (fused_kernel.py), False for the plain version,
    "auto" for the kernels if fused_kernel_check.py measured equal results and no lower speed at these shapes.
    """
    if not isinstance(temperature, Tensor):
        temperature = similarity.new_full((), temperature)
    own_rows, present = _own_keys(runs, target)
    bias = (strength * log_prior - runs.lengths.clamp(min=1).to(log_prior.dtype).log())[runs.row_class]
    bias = bias.to(similarity.dtype)
    if fused == "auto":
        fused = kernels_may_run(similarity) and kernels_are_right(similarity, runs.longest, SplitAtOwnClass)
    split = FusedSplit if fused else SplitAtOwnClass
    own, rest, rest_of_tau = split.apply(similarity, own_rows, bias, temperature)

    others = present & (key_ids[own_rows] != query_ids[:, None])
    own_prior = strength * log_prior[target]
    gml, _ = _mean_loss(own / temperature.detach(), present, own_prior, rest)
    tau, left_out = _mean_loss(own.detach() / temperature, others, own_prior, rest_of_tau)
    return ContrastLosses(gml, tau, left_out)


def queries_with_keys(runs: KeyRuns, target: Tensor, query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Number of queries that L_tau averages over: those whose class has a key of another sample. A scalar, int64."""
    own_rows, present = _own_keys(runs, target)
    return (present & (key_ids[own_rows] != query_ids[:, None])).any(1).sum()


def _own_keys(runs: KeyRuns, target: Tensor) -> tuple[Tensor, Tensor]:
    """Key rows of each query's class, int64 [B,L], and a mask of the valid ones, bool [B,L]; padding repeats the last row."""
    length = runs.lengths[target][:, None]
    step = torch.arange(runs.longest, device=target.device)
    own_rows = runs.starts[target][:, None] + torch.minimum(step, (length - 1).clamp(min=0))
    return own_rows.clamp(max=len(runs.row_class) - 1), step < length


def _mean_loss(exponent: Tensor, kept: Tensor, own_prior: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Batch mean of -log sigmoid(own - rest) over the queries with a valid key; number of queries without one, same dtype.

    exponent: [B,L], similarity / tau of the keys of the query's class; kept: [B,L] bool, the valid keys; own_prior,
    rest: [B].
    """
    keys = kept.sum(1)
    empty = keys == 0
    # A row without a valid key would be -inf throughout and its gradient NaN. Such a row keeps all its keys and gets
    # weight 0.
    exponent = exponent.masked_fill(~(kept | empty[:, None]), -torch.inf)
    own = exponent.logsumexp(1) - keys.clamp(min=1).to(exponent.dtype).log() + own_prior
    weight = (~empty).to(exponent.dtype)
    losses = -F.logsigmoid(own - rest)
    return (losses * weight).sum() / weight.sum().clamp(min=1.0), empty.sum().to(exponent.dtype)


class SplitAtOwnClass(torch.autograd.Function):
    """Autograd function: similarity [B,K] → its values at own_rows [B,L], and `rest` [B] twice, for L_GML and for L_tau.

    The gradient of the first `rest` goes to the similarity only, that of the second to the temperature only. Of size
    [B,K], only the posterior over the keys of the other classes is saved for backward: the gradient is a multiple of it
    in each row.
    """

    @staticmethod
    def forward(
        ctx: Any, similarity: Tensor, own_rows: Tensor, bias: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # FLOOR removes the keys of the query's own class from the sums.
        exponent = (similarity / temperature).add_(bias).scatter_(1, own_rows, FLOOR)
        # softmax is one pass over memory, logsumexp three. log-sum-exp is the largest exponent minus the log of its
        # probability.
        posterior = torch.softmax(exponent, 1)
        rest = exponent.amax(1) - posterior.amax(1).log()
        mean = torch.mul(posterior, similarity, out=exponent).sum(1) if ctx.needs_input_grad[3] else rest
        ctx.save_for_backward(posterior, own_rows, mean, temperature)
        # Two tensors of equal value, so that autograd keeps the gradients of L_GML and L_tau apart.
        return similarity.gather(1, own_rows), rest, rest.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_own: Tensor, to_rest: Tensor, to_rest_of_tau: Tensor) -> tuple[Tensor | None, ...]:
        posterior, own_rows, mean, temperature = ctx.saved_tensors
        to_similarity = to_temperature = None
        if ctx.needs_input_grad[0]:
            to_similarity = posterior * (to_rest / temperature)[:, None]
            to_similarity.scatter_add_(1, own_rows, to_own)
        if ctx.needs_input_grad[3]:
            to_temperature = -(to_rest_of_tau * mean).sum() / temperature**2
        return to_similarity, None, None, to_temperature
