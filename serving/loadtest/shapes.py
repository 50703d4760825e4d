"""Load shapes: the number of active users over the time of a load test."""

from __future__ import annotations

import math
from collections.abc import Callable

STEPS = 5
SPIKE = (0.4, 0.6)  # start and end of the full load, as fractions of the time
SPIKE_BASE = 0.2  # fraction of the users before and after the spike
RAMP = 0.05  # fraction of the time in which a soak reaches all users


# Fraction of the users as a function of the fraction of the time.
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "steps": lambda part: (math.floor(part * STEPS) + 1) / STEPS,
    "spike": lambda part: 1.0 if SPIKE[0] <= part < SPIKE[1] else SPIKE_BASE,
    "soak": lambda part: min(1.0, part / RAMP),
}


def users_at(shape: str, elapsed: float, seconds: float, users: int) -> int | None:
    """Return the number of active users `elapsed` seconds after the start, from 1 to `users`; None after `seconds`.

    constant: all users. steps: a fifth of the users more in each fifth of the time. spike: a fifth of the users, and
    all users in the middle fifth of the time. soak: ramp up over the first twentieth of the time, then all users.
    """
    if elapsed >= seconds:
        return None
    return min(users, max(1, math.ceil(users * SHAPES[shape](elapsed / seconds) - 1e-9)))
