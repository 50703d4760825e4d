"""Estimation of the class prior of unlabelled data from the predictions of a classifier (label shift).

Label shift: the distribution of images within each class is unchanged, only the class prior p has changed. In the
mixture `sum_c p(c) · p(x | c)` only p is unknown. A calibrated classifier gives `p(x | c)` up to a factor: its
probability divided by the prior that it assumes. Imports only numpy, like models/prior.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.prior import Floats, check_target_prior

TOLERANCE = 1e-4
# The bootstrap may stop earlier: a hundredth of a nat is a seventh of a standard error, in any direction.
BOOTSTRAP_TOLERANCE = 1e-2
# Elements of the largest array that the bootstrap allocates at a time (float64: 64 MiB).
CHUNK = 8_000_000


@dataclass(frozen=True)
class PriorEstimate:
    """An estimated class prior and the state of the search.

    prior: float64 [C], sums to 1. gap: upper bound, in nats, on the remaining increase of the objective over all
    samples. converged: gap <= tolerance. iterations: passes over the data.
    """

    prior: Floats
    gap: float
    converged: bool
    iterations: int


def estimate_prior(
    probabilities: Any,
    source_prior: Any = None,
    concentration: Any = None,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = 2000,
) -> PriorEstimate:
    """Estimate the class prior by maximum likelihood: EM (Saerens, Latinne and Decaestecker 2002, Eq. 2.9), or MAP.

    probabilities: [N,C], each row sums to 1. source_prior: [C], the prior that the probabilities assume; None is
    uniform, as for a student's balanced logits. concentration: of a Dirichlet prior on the estimate, a number or [C],
    >= 1. None or 1 is EM; above 1 is MAP, which adds concentration - 1 samples to every class (MAPLS, Ye et al. 2024;
    `mapls_concentration` converts its λ). Both objectives are concave, so there is a single maximum. Steps are
    extrapolated (SQUAREM, Varadhan and Roland 2008) and accepted only if they increase the objective. Returns the
    estimate even if the search has not converged: check `converged`. Raises ValueError that names the invalid argument.
    """
    ratio = _likelihood_ratio(probabilities, source_prior)
    pseudo = _pseudo_counts(concentration, ratio.shape[1])
    _check_search(tolerance, max_iterations)
    start = np.full((ratio.shape[1], 1), 1 / ratio.shape[1])
    prior, gap, passes = _maximise(ratio, np.ones((len(ratio), 1)), pseudo, start, tolerance, max_iterations)
    return PriorEstimate(prior[:, 0], float(gap[0]), bool(gap[0] <= tolerance), passes)


def mapls_concentration(em_share: float, samples: int, classes: int) -> float:
    """Dirichlet concentration that makes a MAP step equal to a step of MAPLS: em_share · EM step + (1 - em_share) · uniform.

    em_share: λ of MAPLS, in (0, 1]; samples: N; classes: C. Raises ValueError for another λ or count.
    """
    if not 0 < em_share <= 1:
        raise ValueError(f"em_share is {em_share}; expected a share above 0, at most 1")
    if samples < 1 or classes < 1:
        raise ValueError(f"samples is {samples} and classes is {classes}; expected at least 1 of both")
    return 1 + samples * (1 - em_share) / (em_share * classes)


def bootstrap_priors(
    probabilities: Any,
    estimate: PriorEstimate,
    source_prior: Any = None,
    concentration: Any = None,
    *,
    resamples: int = 200,
    seed: int = 0,
    tolerance: float = BOOTSTRAP_TOLERANCE,
    max_iterations: int = 500,
) -> Floats:
    """Bootstrap estimates of the class prior (samples drawn with replacement): float64 [resamples, C], fixed by the seed.

    The bootstrap is used and not the Fisher information, because a tail class is at the edge of the simplex, where a
    normal interval has a negative lower bound. Each search starts at `estimate`. All searches run together, as matrix
    products. The cost is at most max_iterations passes over N x C x resamples numbers; memory is bounded by CHUNK.
    Raises ValueError as estimate_prior does, and when a search has not converged within `tolerance` nats, because the
    interval would be too narrow.
    """
    ratio = _likelihood_ratio(probabilities, source_prior)
    samples, classes = ratio.shape
    pseudo = _pseudo_counts(concentration, classes)
    _check_search(tolerance, max_iterations)
    if resamples < 2:
        raise ValueError(f"resamples is {resamples}; expected at least 2")
    if estimate.prior.shape != (classes,):
        raise ValueError(f"estimate is of {len(estimate.prior)} classes; expected {classes}, as in probabilities")
    generator = np.random.default_rng(seed)
    # A class at zero would stay at zero, because the updates are multiplicative.
    start = np.maximum(estimate.prior, 1 / (100 * samples * classes))[:, None]
    start = start / start.sum()
    priors, chunk = [], max(1, CHUNK // max(samples, classes))
    for first in range(0, resamples, chunk):
        number = min(chunk, resamples - first)
        weights = generator.multinomial(samples, np.full(samples, 1 / samples), number).T.astype(np.float64)
        prior, gap, _ = _maximise(ratio, weights, pseudo, np.repeat(start, number, 1), tolerance, max_iterations)
        if np.any(gap > tolerance):
            raise ValueError(
                f"max_iterations is {max_iterations}, too few for {int((gap > tolerance).sum())} of {number} resamples "
                f"(worst gap {gap.max():.2g} nats); raise it, or set concentration above 1"
            )
        priors.append(prior.T)
    return np.concatenate(priors)


def interval(values: Floats, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Lower and upper percentile bounds of bootstrap values [B,...] over the first axis.

    Raises ValueError unless confidence is in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def total_variation(p: Any, q: Any) -> Any:
    """Total variation distance: half the sum of |p - q| over the last axis, 0 to 1.

    It is the share of samples whose class must change to turn p into q.
    """
    return np.abs(np.asarray(p, dtype=np.float64) - np.asarray(q, dtype=np.float64)).sum(axis=-1) / 2


def _likelihood_ratio(probabilities: Any, source_prior: Any) -> Floats:
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or p.shape[0] < 1 or p.shape[1] < 2:
        raise ValueError(f"probabilities has shape {list(p.shape)}; expected [N, C] with N >= 1 and C >= 2")
    if not np.all(np.isfinite(p)) or np.any(p < 0) or np.any(np.abs(p.sum(axis=1) - 1) > 1e-3):
        raise ValueError(
            "probabilities has a row that is none; expected numbers >= 0 that sum to 1 (softmax of logits)"
        )
    if source_prior is None:
        return p
    source = check_target_prior(source_prior, p.shape[1])
    if source.ndim != 1 or np.any(source == 0):
        raise ValueError("source_prior has a class without mass; expected one number > 0 per class")
    ratio: Floats = p / source
    ratio /= ratio.max(axis=1, keepdims=True)
    return ratio


def _pseudo_counts(concentration: Any, classes: int) -> Floats:
    alpha = np.broadcast_to(np.asarray(1.0 if concentration is None else concentration, dtype=np.float64), (classes,))
    if not np.all(np.isfinite(alpha)) or np.any(alpha < 1):
        raise ValueError(f"concentration is {concentration}; expected finite numbers >= 1, one or one per class")
    return alpha[:, None] - 1


def _check_search(tolerance: float, max_iterations: int) -> None:
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; expected a number of nats above 0")
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; expected at least 1")


def _maximise(
    ratio: Floats, weights: Floats, pseudo: Floats, prior: Floats, tolerance: float, max_iterations: int
) -> tuple[Floats, Floats, int]:
    """Maximise Σ_i weights_ib log(ratio_i · p_b) + Σ_c pseudo_c log p_cb over priors p [C,B].

    Returns the priors [C,B], their gaps [B] and the number of passes.
    """
    mass = weights.sum(axis=0) + pseudo.sum()
    done = np.zeros(prior.shape[1], dtype=bool)
    gap, passes = np.full(prior.shape[1], np.inf), 0
    prior = prior.copy()
    density = _density(ratio, prior)
    while passes < max_iterations and not done.all():
        active = np.flatnonzero(~done)
        p, w, m = prior[:, active], weights[:, active], mass[active]
        slope = _slope(ratio, w, pseudo, p, density[:, active])
        gap[active] = slope.max(axis=0) - m
        done[active] = gap[active] <= tolerance
        if done.all():
            break
        first = p * slope / m  # the EM step
        second = first * _slope(ratio, w, pseudo, first, _density(ratio, first)) / m
        ahead = _extrapolate(p, first, second)
        candidates = [(point, _density(ratio, point)) for point in (second, ahead)]
        values = [_value(of, w, pseudo, point) for point, of in candidates]
        # A converged column is not changed. The others take the better of the two points, with its densities.
        for index, chosen in enumerate((values[1] <= values[0], values[1] > values[0])):
            moving = chosen & ~done[active]
            prior[:, active[moving]], density[:, active[moving]] = (part[:, moving] for part in candidates[index])
        passes += 4
    if not done.all():
        gap = np.where(done, gap, _slope(ratio, weights, pseudo, prior, density).max(axis=0) - mass)
    return prior, np.maximum(gap, 0), passes


def _density(ratio: Floats, prior: Floats) -> Floats:
    """Density of each sample, Σ_c ratio_ic p_cb: [N,B], positive."""
    return np.maximum(ratio @ _above_zero(prior), np.finfo(np.float64).tiny)


def _value(density: Floats, weights: Floats, pseudo: Floats, prior: Floats) -> Floats:
    """Log-posterior [B]."""
    value: Floats = (weights * np.log(density)).sum(axis=0) + (pseudo * np.log(_above_zero(prior))).sum(axis=0)
    return value


def _slope(ratio: Floats, weights: Floats, pseudo: Floats, prior: Floats, density: Floats) -> Floats:
    """Gradient of the log-posterior [C,B].

    By concavity the log-posterior is at most max(gradient) - mass below its maximum.
    """
    slope: Floats = ratio.T @ (weights / density) + pseudo / _above_zero(prior)
    return slope


def _above_zero(prior: Floats) -> Floats:
    return np.maximum(prior, np.finfo(np.float64).tiny)


def _extrapolate(p: Floats, first: Floats, second: Floats) -> Floats:
    """SQUAREM step along p → first → second, projected back into the simplex: [C,B]."""
    change = first - p
    bend = second - first - change
    length = np.sqrt((change**2).sum(axis=0) / np.maximum((bend**2).sum(axis=0), 1e-300))
    length = np.clip(length, 1, 1e6)
    ahead: Floats = p + 2 * length * change + length**2 * bend
    # An entry that would be negative gets a share of its value after a plain step.
    ahead = np.maximum(ahead, 0.01 * second)
    ahead /= ahead.sum(axis=0)
    return ahead
