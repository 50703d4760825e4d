"""Contrast losses L_GML and L_tau of one batch in one pass; the cost does not depend on the number of classes.

With bias_k = strength * log p(c) - log n_c for a key k of class c, the softmax over classes of Eq. 4 is a softmax over
keys: sum_c p(c)^strength * s_c = sum_k exp(similarity_k / tau + bias_k). Only the score of the query's own class is
needed:

    loss = -log sigmoid(own - other_logsumexp)
    own = log s_y + strength * log p(y), over the keys of the query's class
    other_logsumexp = log-sum-exp of similarity / tau + bias, over all other keys

L_tau excludes the query's own sample. At equal temperature it has the same `other_logsumexp` as L_GML; only `own`
differs. Both are separate sums and are never obtained by subtraction, so there is no cancellation. Neither underflows
to log 0 at any temperature. `TextCentres` is the term of constant keys, such as text features.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.contrast.fused_kernel import FLOOR, FusedOwnClassLogSumExp
from models.contrast.fused_kernel_check import kernels_pass_check, kernels_supported
from models.contrast.queues import ClassQueues
from models.contrast.terms import ContrastInputs, ContrastTerm
from models.networks.autocast import full_precision, without_autocast


class ClassSegments(NamedTuple):
    """Key rows of each class: class c has the rows starts[c] to starts[c] + lengths[c] - 1, as in ClassQueues.

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
    segments: ClassSegments | ClassQueues,
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
    own_rows, present = _own_keys(segments, target)
    bias = (strength * log_prior - segments.lengths.clamp(min=1).to(log_prior.dtype).log())[segments.row_class]
    bias = bias.to(similarity.dtype)
    if fused == "auto":
        fused = kernels_supported(similarity) and kernels_pass_check(similarity, segments.longest, OwnClassLogSumExp)
    split = FusedOwnClassLogSumExp if fused else OwnClassLogSumExp
    own, other_logsumexp, other_logsumexp_tau = split.apply(similarity, own_rows, bias, temperature)

    others = present & (key_ids[own_rows] != query_ids[:, None])
    own_prior = strength * log_prior[target]
    gml, _ = _mean_loss(own / temperature.detach(), present, own_prior, other_logsumexp)
    tau, queries_without_keys = _mean_loss(own.detach() / temperature, others, own_prior, other_logsumexp_tau)
    return ContrastLosses(gml, tau, queries_without_keys)


def queries_with_keys(
    segments: ClassSegments | ClassQueues, target: Tensor, query_ids: Tensor, key_ids: Tensor
) -> Tensor:
    """Number of queries that L_tau averages over: those whose class has a key of another sample. A scalar, int64."""
    own_rows, present = _own_keys(segments, target)
    return (present & (key_ids[own_rows] != query_ids[:, None])).any(1).sum()


def _own_keys(segments: ClassSegments | ClassQueues, target: Tensor) -> tuple[Tensor, Tensor]:
    """Key rows of each query's class, int64 [B,L], and a mask of the valid ones, bool [B,L]; padding repeats the last row."""
    length = segments.lengths[target][:, None]
    step = torch.arange(segments.longest, device=target.device)
    own_rows = segments.starts[target][:, None] + torch.minimum(step, (length - 1).clamp(min=0))
    return own_rows.clamp(max=len(segments.row_class) - 1), step < length


def _mean_loss(exponent: Tensor, valid: Tensor, own_prior: Tensor, other_logsumexp: Tensor) -> tuple[Tensor, Tensor]:
    """Batch mean of -log sigmoid(own - other_logsumexp) over queries with a valid key, and the number of the others.

    exponent: [B,L], similarity / tau of the keys of the query's class; valid: [B,L] bool, the valid keys; own_prior and
    other_logsumexp: [B]. Both results have the dtype of exponent.
    """
    keys = valid.sum(1)
    empty = keys == 0
    # A row without a valid key would be -inf throughout and its gradient NaN. Such a row keeps all its keys and gets
    # weight 0.
    exponent = exponent.masked_fill(~(valid | empty[:, None]), -torch.inf)
    own = exponent.logsumexp(1) - keys.clamp(min=1).to(exponent.dtype).log() + own_prior
    weight = (~empty).to(exponent.dtype)
    losses = -F.logsigmoid(own - other_logsumexp)
    return (losses * weight).sum() / weight.sum().clamp(min=1.0), empty.sum().to(exponent.dtype)


class OwnClassLogSumExp(torch.autograd.Function):
    """Autograd function: similarity [B,K] → its values at own_rows [B,L], and `other_logsumexp` [B] twice.

    The first is for L_GML, and its gradient goes to the similarity only; the second is for L_tau, and its gradient goes
    to the temperature only. Of size [B,K], only the posterior over the keys of the other classes is saved for backward:
    the gradient is a multiple of it in each row.
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
        other_logsumexp = exponent.amax(1) - posterior.amax(1).log()
        mean = torch.mul(posterior, similarity, out=exponent).sum(1) if ctx.needs_input_grad[3] else other_logsumexp
        ctx.save_for_backward(posterior, own_rows, mean, temperature)
        # Two tensors of equal value, so that autograd keeps the gradients of L_GML and L_tau apart.
        return similarity.gather(1, own_rows), other_logsumexp, other_logsumexp.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_own: Tensor, grad_other_gml: Tensor, grad_other_tau: Tensor
    ) -> tuple[Tensor | None, ...]:
        posterior, own_rows, mean, temperature = ctx.saved_tensors
        grad_similarity = grad_temperature = None
        if ctx.needs_input_grad[0]:
            grad_similarity = posterior * (grad_other_gml / temperature)[:, None]
            grad_similarity.scatter_add_(1, own_rows, grad_own)
        if ctx.needs_input_grad[3]:
            grad_temperature = -(grad_other_tau * mean).sum() / temperature**2
        return grad_similarity, None, None, grad_temperature


class UnitVectors(nn.Module):
    """Features → unit vectors, without weights: the heads of centres in the space of the image features."""

    def forward(self, features: Tensor) -> Tensor:
        """[N,D] → [N,D]."""
        return F.normalize(full_precision(features), dim=1)


class TextCentres(ContrastTerm):
    """L_GML + L_tau of one query view against constant features with classes, such as text features (Sec. 3.4).

    There is no queue: the keys of class c are its rows, n of them are its |Z_c|. No key is a training image, so that L_tau
    excludes no pair and its value is that of L_GML. Buffers, not in the state_dict: features [N,E], row_class [N] int64
    sorted, starts, lengths [C], log_prior [C]. query_head: [B,D] → unit vectors [B,P]; key_head: [N,E] → [N,P], embeds all
    rows in each step.
    """

    features: Tensor
    row_class: Tensor
    starts: Tensor
    lengths: Tensor
    log_prior: Tensor

    def __init__(
        self,
        query_head: nn.Module,
        key_head: nn.Module,
        features: Tensor,
        row_class: Tensor,
        log_prior: Tensor,
        tau_g: float,
        train_tau_g: bool = False,
        strength: float = 1.0,
    ) -> None:
        """strength: α of Eq. 10. Raises ValueError if row_class is not sorted or a class of the prior has no row."""
        super().__init__()
        lengths = torch.bincount(row_class, minlength=len(log_prior))
        if not torch.equal(row_class, row_class.sort().values) or len(lengths) > len(log_prior) or not lengths.all():
            raise ValueError(
                f"row_class is not sorted, or its classes are not 0 to {len(log_prior) - 1}, each with a row"
            )
        self.query_head, self.key_head, self.strength = query_head, key_head, strength
        self.longest = int(lengths.max())  # a Python int, because shapes depend on it
        constants = {
            "features": features, "row_class": row_class, "starts": lengths.cumsum(0) - lengths, "lengths": lengths,
            "log_prior": log_prior,
        }  # fmt: skip
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)
        initial = torch.tensor(tau_g, dtype=log_prior.dtype)
        self.log_tau_g = nn.Parameter(initial.log(), requires_grad=train_tau_g)

    def forward(self, inputs: ContrastInputs) -> dict[str, Tensor]:
        """queries [1,B,D], target [B] → loss, and detached gml, tau (if tau_g is trained) and tau_g; scalar tensors."""
        self.check(inputs)
        query, keys = self.query_head(inputs.queries[0]), self.key_head(self.features)
        with without_autocast(query):
            similarity = query @ keys.T
        segments = ClassSegments(self.row_class, self.starts, self.lengths, self.longest)
        no_sample = torch.full_like(self.row_class, -1)
        losses = contrast_losses(
            similarity, segments, inputs.target, self.log_prior, self.log_tau_g.exp(), self.strength,
            query_ids=inputs.sample_ids, key_ids=no_sample,
        )  # fmt: skip
        observed = {"gml": losses.gml.detach(), "tau_g": self.log_tau_g.detach().exp()}
        if not self.log_tau_g.requires_grad:
            return {"loss": losses.gml, **observed}
        return {"loss": losses.gml + losses.tau, **observed, "tau": losses.tau.detach()}

    def batch_modules(self) -> list[nn.Module]:
        """The query head; the input of the key head is the same on all ranks."""
        return [self.query_head]

    def undecayed(self) -> list[nn.Parameter]:
        """log tau_g."""
        return [self.log_tau_g]
