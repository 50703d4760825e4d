"""Accuracy under label shift: the five shifted test sets of SADE (2022), with known and estimated target priors."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.label_shift import TOLERANCE, estimate_prior, mapls_concentration, total_variation
from models.prior import adjust_logits, log_target_prior, softmax
from pipeline.shared.errors import DataError

SETS = {"forward 50": 50.0, "forward 10": 10.0, "uniform": 1.0, "backward 10": 0.1, "backward 50": 0.02}
MAPLS_LAMBDA = 0.9


def shifted_prior(counts: list[int], ratio: float) -> np.ndarray:
    """Target prior [C]: exponential over the classes from most to least frequent in training, first / last = ratio."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    p = np.empty(len(counts))
    p[order] = ratio ** -np.linspace(0, 1, len(counts))
    return p / p.sum()


def shifted_rows(labels: np.ndarray, prior: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Row indices of the largest test subset that follows the prior, with at least one row per class.

    Drawn without replacement. Raises DataError if a class has no test sample.
    """
    available = np.bincount(labels, minlength=len(prior))
    if not available.all():
        raise DataError(
            f"class {int(available.argmin())} has no test sample; a shifted test set needs one of every class"
        )
    sizes = np.maximum((prior * (available / prior).min() + 1e-9).astype(int), 1)
    return np.concatenate([generator.permutation(np.flatnonzero(labels == c))[:size] for c, size in enumerate(sizes)])


def shift_table(
    logits: np.ndarray,
    labels: np.ndarray,
    counts: list[int],
    *,
    draws: int = 20,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> list[dict[str, Any]]:
    """One row per method of logit adjustment: mean accuracy over `draws` test subsets of each shifted set.

    logits: balanced, [N,C]; labels: [N]; counts: training samples per class. The prior is estimated from the logits of
    the subset on which it is used, without labels. tolerance: largest gap of the estimate's objective to its optimum,
    in nats. The last two rows are the total variation between estimated and true prior. Equal seeds give equal tables.
    Raises DataError if a class has no test sample.
    """
    scores: dict[str, dict[str, list[float]]] = {}  # row → shifted set → value of each draw
    for name, ratio in SETS.items():
        target, generator = shifted_prior(counts, ratio), np.random.default_rng(seed)
        for _ in range(draws):
            rows = shifted_rows(labels, target, generator)
            z, concentration = logits[rows], mapls_concentration(MAPLS_LAMBDA, len(rows), len(counts))
            p = softmax(z)
            estimates = {
                method: estimate_prior(p, concentration=alpha, tolerance=tolerance).prior
                for method, alpha in (("EM", None), ("MAP", concentration))
            }
            priors = {"known prior": target}
            priors |= {f"estimated prior ({method})": estimate for method, estimate in estimates.items()}
            predicted = {"no adjustment": z.argmax(1)}
            for row, prior in priors.items():
                predicted[row] = adjust_logits(z, log_target_prior(prior).astype(z.dtype), 1.0).argmax(1)
            values = {row: float((classes == labels[rows]).mean()) for row, classes in predicted.items()}
            for method, estimate in estimates.items():
                values[f"distance of {method}"] = float(total_variation(estimate, target))
            for row, value in values.items():
                scores.setdefault(row, {}).setdefault(name, []).append(value)
    return [{"prior": row, **{name: float(np.mean(s)) for name, s in sets.items()}} for row, sets in scores.items()]
