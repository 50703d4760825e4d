"""Class prior and logit adjustment: the only module that computes them, in training and in serving.

Imports only numpy, because the served classifier imports this file without torch. The functions also accept torch
tensors, because they use only operators that both libraries support.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf(inity)?)", re.IGNORECASE | re.ASCII)
# Finite, because -inf times a strength of 0 is NaN; below every logit for any tau_s, and half of float32's range.
RULED_OUT = float(np.finfo(np.float32).min) / 2
GROUPS = ("many", "medium", "few")  # by number of training samples, see shot_group; of pixels, see pixel_groups
MANY_ABOVE = 100
FEW_BELOW = 20


def class_key(name: str) -> str:
    """Normal form for comparing and storing class names: Unicode's composed form (NFC).

    The same name typed on Linux (NFC) and copied from macOS (NFD) is two strings: `\u00e9` and `e\u0301`.
    """
    return unicodedata.normalize("NFC", name)


def class_names_problem(names: Sequence[str]) -> str | None:
    """The reason why class names are invalid, or None: the server's label file needs unique names, one per line."""
    for name in names:
        if not name.strip() or name.splitlines() != [name]:
            return f"class name {name!r} is empty or has a line break; rename the class"
    keys = [class_key(name) for name in names]
    if len(set(keys)) < len(keys):
        twice = next(name for name in keys if keys.count(name) > 1)
        return f"class name {twice!r} occurs twice; rename one of the two classes"
    return None


def class_prior(counts: Any, smoothing: float = 0.0) -> Floats:
    """Frequency of each class in the training split: (n_c + smoothing) / sum(n + smoothing).

    counts: [C] integers, samples per class. smoothing: pseudo-count added to every class, >= 0; the official code uses
    none. Returns p, float64 [C], sums to 1. Raises ValueError for a negative count, and for a class without samples
    unless smoothing > 0 (its log would be -inf).
    """
    n = np.asarray(counts, dtype=np.float64)
    if n.ndim != 1 or n.size == 0:
        raise ValueError(f"counts has shape {n.shape}; expected one count per class, shape [C]")
    if not smoothing >= 0 or not np.isfinite(smoothing):
        raise ValueError(f"smoothing is {smoothing}; expected a finite number >= 0")
    if not np.all(np.isfinite(n)) or np.any(n < 0):
        raise ValueError(f"counts has {n[~np.isfinite(n) | (n < 0)][0]}; expected finite numbers >= 0")
    empty = np.flatnonzero(n + smoothing == 0)
    if empty.size:
        raise ValueError(
            f"class {int(empty[0])} has no training samples (such classes: {empty.size}); "
            "add samples, drop the class, or set prior.smoothing above 0"
        )
    smoothed: Floats = n + smoothing
    smoothed /= smoothed.sum()
    return smoothed


def effective_number(counts: Any, beta: float) -> Floats:
    """Effective number of samples of each class, (1 - β^n) / (1 - β) (Cui et al. 2019, Eq. 2): float64 [C].

    counts: [C] numbers >= 0. beta: above 0 and below 1. Towards 0 every class counts as one sample, towards 1 as n_c
    samples. Raises ValueError for another beta.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}; expected a number above 0 and below 1")
    n = np.asarray(counts, dtype=np.float64)
    # expm1 keeps the digits that 1 - β^n loses if β is near 1.
    number: Floats = -np.expm1(n * np.log1p(-(1 - beta))) / (1 - beta)
    return number


def log_class_prior(counts: Any, smoothing: float = 0.0) -> Floats:
    """Log of `class_prior`, the η_c of Eq. 4 and Eq. 6: float64 [C]. Raises as `class_prior` does."""
    return np.log(class_prior(counts, smoothing))


def adjust_logits(logits: Any, log_prior: Any, strength: Any) -> Any:
    """Logit adjustment: logits + strength * log_prior.

    logits: [B,C]; log_prior: [C]; strength: a number, or [B,1] for one value per row. Accepts numpy arrays and torch
    tensors. In the loss, strength is 1 (Eq. 6) or α (Eq. 10). Applied after training, it moves the prediction from the
    balanced target prior (strength 0) to the training prior (strength 1).
    """
    return logits + strength * log_prior


def calibrate_logits(logits: Any, temperature: Any, bias: Any = 0.0) -> Any:
    """Calibrated logits: logits / temperature + bias, before a prior is added (Guo et al. 2017; bias: Alexandari 2020).

    logits: balanced, [B,C]; temperature: a number above 0; bias: a number or [C]. Accepts numpy arrays and torch tensors. The
    order matters: balanced logits are log p(image | class) up to a factor that the temperature corrects, and a prior is exact.
    """
    return logits / temperature + bias


def parse_number(text: str) -> float:
    """Parse a decimal number, nan or inf.

    Raises ValueError for other forms that float() accepts: 1_0, digits of other scripts.
    """
    if not NUMBER.fullmatch(text):
        raise ValueError("not a decimal number")
    return float(text)


def check_numbers(values: Any) -> Floats:
    """Convert a list or array of numbers to float64. Raises ValueError for text and booleans, which numpy would convert."""
    array = values if isinstance(values, np.ndarray) else np.array(values, dtype=object)
    if array.dtype.kind not in "iuf":
        kinds = set(map(type, array.ravel().tolist()))
        for kind in kinds:
            if kind is bool or not issubclass(kind, int | float | np.integer | np.floating):
                raise ValueError(f"holds a {kind.__name__}, which is not a number")
    numbers: Floats = array.astype(np.float64)
    return numbers


def balanced_shift(log_prior: Any, loss_log_prior: Any, strength: float) -> Any:
    """Shift that converts a network's logits to the balanced target prior: strength * η - log p, [C], to be added to them.

    log_prior: log p of the class frequencies of the training data. loss_log_prior, strength: η and its factor in L_cls.
    L_cls is minimal if logit + strength * η is log p(class | image), so the logit contains log p - strength * η in
    addition to log p(image | class). The shift is exactly 0 for Eq. 6 (η = log p, strength 1), and
    (strength - 1) * log p for another strength.
    """
    return strength * loss_log_prior - log_prior


def check_target_prior(prior: Any, classes: int) -> Floats:
    """Check and normalise a caller's target prior: float64 [..., classes], each row >= 0 with a sum of 1 within 1e-3.

    Raises ValueError that names the fault: shape, a negative or non-finite entry, or the sum.
    """
    p = np.asarray(prior, dtype=np.float64)
    if p.ndim == 0 or p.shape[-1] != classes:
        raise ValueError(f"target_prior has shape {list(p.shape)}; expected {classes} numbers, one per class")
    if not np.all(np.isfinite(p)):
        raise ValueError("target_prior has an entry that is not finite; expected numbers >= 0 that sum to 1")
    if np.any(p < 0):
        raise ValueError(f"target_prior has a negative entry ({float(p.min()):g}); expected numbers >= 0 that sum to 1")
    total = p.sum(axis=-1, keepdims=True)
    if np.any(np.abs(total - 1) > 1e-3):
        worst = float(total.flat[int(np.argmax(np.abs(total - 1)))])
        raise ValueError(f"target_prior sums to {worst:g}; expected a sum of 1")
    exact: Floats = p / total
    return exact


def log_target_prior(prior: Any) -> Floats:
    """Log of a checked target prior, float64. A class with prior 0 gets RULED_OUT: its probability is 0 and never NaN."""
    p = np.asarray(prior, dtype=np.float64)
    log: Floats = np.log(p, out=np.full(p.shape, RULED_OUT), where=p > 0)
    return log


def softmax(logits: NDArray[Any]) -> Floats:
    """Softmax over the last axis of finite numpy logits [..., C]: float64."""
    z = np.asarray(logits)
    # In place: for ten thousand classes every further copy takes gigabytes.
    p: Floats = np.subtract(z, z.max(axis=-1, keepdims=True), dtype=np.float64)
    np.exp(p, out=p)
    p /= p.sum(axis=-1, keepdims=True)
    return p


def shot_group(count: int) -> str:
    """Shot group by training samples, as in the literature: `many` (> 100), `few` (< 20), `medium` (20 to 100)."""
    if count > MANY_ABOVE:
        return "many"
    return "few" if count < FEW_BELOW else "medium"


def pixel_groups(counts: Any) -> list[str]:
    """Group of each class by its share of the training pixels: terciles, `many` for the most frequent third.

    counts: [C] pixels. Of equal counts the lower class index is the more frequent one. If C is not a multiple of 3, the
    first groups have one class more. The limits of `shot_group` count images and have no meaning for pixels.
    """
    n = np.asarray(counts)
    groups = [""] * len(n)
    for group, members in zip(GROUPS, np.array_split(np.argsort(-n, kind="stable"), len(GROUPS)), strict=True):
        for member in members:
            groups[int(member)] = group
    return groups
