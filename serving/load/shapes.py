"""The number of active users over the time of a load test."""

from __future__ import annotations

import math
from collections.abc import Callable

STEPS = 5
SPIKE = (0.4, 0.6)  # part of the time at full load
SPIKE_BASE = 0.2  # part of the users before and after
RAMP = 0.05  # part of the time that a soak takes to fill up


def _constant(_part: float) -> float:
    return 1.0


def _steps(part: float) -> float:
    return (math.floor(part * STEPS) + 1) / STEPS


def _spike(part: float) -> float:
    return 1.0 if SPIKE[0] <= part < SPIKE[1] else SPIKE_BASE


def _soak(part: float) -> float:
    return min(1.0, part / RAMP)


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "steps": _steps,
    "spike": _spike,
    "soak": _soak,
}


def users_at(shape: str, elapsed: float, seconds: float, users: int) -> int | None:
    """The active users `elapsed` seconds after the start, from 1 to `users`; None when the time is over.

    constant: all of them. steps: a fifth more in each fifth of the time. spike: a fifth of them, all in the middle fifth.
    soak: filled up over the first twentieth, then all.
    """
    if elapsed >= seconds:
        return None
    return min(users, max(1, math.ceil(users * SHAPES[shape](elapsed / seconds) - 1e-9)))
