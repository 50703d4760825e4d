"""The number of active users over the time of a load test."""

from __future__ import annotations

import math
from collections.abc import Callable

STEPS = 5
SPIKE = (0.4, 0.6)  # part of the time at full load
SPIKE_BASE = 0.2  # part of the users before and after
RAMP = 0.05  # part of the time that a soak takes to fill up


# Part of the users by part of the time.
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "steps": lambda part: (math.floor(part * STEPS) + 1) / STEPS,
    "spike": lambda part: 1.0 if SPIKE[0] <= part < SPIKE[1] else SPIKE_BASE,
    "soak": lambda part: min(1.0, part / RAMP),
}


def users_at(shape: str, elapsed: float, seconds: float, users: int) -> int | None:
    """The active users `elapsed` seconds after the start, from 1 to `users`; None when the time is over.

    constant: all of them. steps: a fifth more in each fifth of the time. spike: a fifth of them, all in the middle fifth.
    soak: filled up over the first twentieth, then all.
    """
    if elapsed >= seconds:
        return None
    return min(users, max(1, math.ceil(users * SHAPES[shape](elapsed / seconds) - 1e-9)))
