"""Probabilistic contrastive loss, ProCo (Du et al. 2024): each class is a von Mises-Fisher distribution on the sphere.

Class c has the mean direction mu_c and the concentration kappa_c, estimated from the running mean m_c of its projected
features: kappa = P R / (1 - R^2), R = ||m_c||. The expectation over infinitely many contrast samples of a class has the
closed form l_c = g(||kappa_c mu_c + q / tau||) - g(kappa_c), g(t) = log I_{P/2-1}(t) - (P/2-1) log t, and the loss is the
cross-entropy of l_c + log prior.

log I_v is the uniform asymptotic expansion (Olver) with four terms, so there is no loop over a series. Below the order
LEAST_ORDER it is not accurate enough, and a recurrence goes down from there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.contrast.memories import ClassMoments
from models.contrast.terms import ContrastInputs, ContrastTerm, gather_views, project
from models.distributed import gather_batch
from models.networks.autocast import without_autocast
from models.prior import adjust_logits

LEAST_ORDER = 31.0  # of P = 64; the absolute error of log I_v is below 1e-10 from here on
LARGEST_KAPPA = 1e5  # from the official code; a class of one feature has R = 1
# u_k(t) = t^k * polynomial in t^2 (Abramowitz and Stegun 9.3.9), coefficients of the lowest power first.
DEBYE = (
    (3 / 24, -5 / 24),
    (81 / 1152, -462 / 1152, 385 / 1152),
    (30375 / 414720, -369603 / 414720, 765765 / 414720, -425425 / 414720),
    tuple(a / 39813120 for a in (4465125, -94121676, 349922430, -446185740, 185910725)),
)


def log_bessel(square: Tensor, order: float) -> Tensor:
    """log(I_v(t) / t^v) of the modified Bessel function of order v > 0, for square = t^2 >= 0, elementwise in float64.

    Finite and differentiable at t = 0. Compared with scipy: test_proco.py.
    """
    square = square.double()
    steps = max(0, math.ceil(LEAST_ORDER - order))
    top = order + steps
    result = _expansion(square, top)
    if steps:
        # G_v = I_v / t^v obeys G_{v-1} = 2 v G_v + t^2 G_{v+1}: downwards, the stable direction.
        ratio = (_expansion(square, top + 1) - result).exp()
        for step in range(steps):
            factor = 2 * (top - step) + square * ratio
            result, ratio = result + factor.log(), 1 / factor
    return result


def _expansion(square: Tensor, order: float) -> Tensor:
    """log(I_v(t) / t^v) for a large order v, from t^2 in float64."""
    s = (1 + square / order**2).sqrt()
    t = 1 / s
    series = torch.zeros_like(t)
    for coefficients in reversed(DEBYE):
        polynomial = torch.zeros_like(t)
        for coefficient in reversed(coefficients):
            polynomial = polynomial * t.square() + coefficient
        series = (series + polynomial) * t / order
    return order * (s - (order * (1 + s)).log()) - 0.5 * (2 * math.pi * order * s).log() + series.log1p()


def concentration(means: Tensor) -> tuple[Tensor, Tensor]:
    """kappa [C] and kappa * mu [C,P] of the class means [C,P], whose lengths are at most 1, as in the official code.

    A class with the mean 0 has kappa 0.
    """
    length = means.norm(dim=1)
    # kappa / R, which is finite at R = 0.
    scale = torch.minimum(means.shape[1] / (1 - length.square()).clamp(min=0), LARGEST_KAPPA / length)
    return scale * length, scale[:, None] * means


def class_logits(query: Tensor, means: Tensor, temperature: float) -> Tensor:
    """l_c of each query and class: [N,C], in the dtype of the queries.

    query: [N,P] unit vectors; means: [C,P]. The length of kappa mu + q / tau is expanded, so that there is one matrix
    product and no tensor [N,C,P].
    """
    kappa, directed = concentration(means.double())
    order = query.shape[1] / 2 - 1
    product = (query @ directed.to(query.dtype).T).double()
    square = kappa.square() + 2 * product / temperature + 1 / temperature**2
    logits = log_bessel(square.clamp(min=0), order) - log_bessel(kappa.square(), order)
    return logits.to(query.dtype)


class ProCo(ContrastTerm):
    """ProCo on two views: the mean over the views of the cross-entropy of the class logits with the prior added.

    head: projection head, features [N,D] → unit vectors [N,P], P > 2; log_prior: [C]. The features of a step, of all
    ranks, are added to the class means before its loss. The means of an epoch include those of the epoch before.
    Raises ValueError for dim <= 2.
    """

    views = 2
    log_prior: Tensor

    def __init__(self, head: nn.Module, log_prior: Tensor, dim: int, temperature: float) -> None:
        """dim: length P of the projected features."""
        super().__init__()
        if dim <= 2:
            raise ValueError(f"dim is {dim}; expected a projection of more than 2 dimensions for ProCo")
        self.head, self.temperature = head, temperature
        self.moments = ClassMoments(len(log_prior), dim)
        self.register_buffer("log_prior", log_prior)

    def begin_epoch(self, epoch: int, epochs: int) -> None:  # noqa: ARG002 - the interface of ContrastTerm
        """Start new sums of the class features."""
        self.moments.begin_epoch(epoch)

    def forward(self, inputs: ContrastInputs) -> dict[str, Tensor]:
        """Loss of a batch; see ContrastTerm."""
        self.check(inputs)
        projected = project(self.head, inputs.queries)
        self.moments.add(gather_views(projected.detach()), gather_batch(inputs.target).repeat(self.views))
        with without_autocast(projected):
            logits = class_logits(projected.flatten(0, 1), self.moments.means(), self.temperature)
        target = inputs.target.repeat(self.views)
        return {"loss": F.cross_entropy(adjust_logits(logits, self.log_prior, 1.0), target)}
