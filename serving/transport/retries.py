"""Retries of a request: when, how long in total, and the waits between them."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any, NoReturn

import tenacity

from serving.shared.errors import InputError
from serving.transport.failures import Unavailable, deadline_exceeded


class Deadline:
    """The end of one call's budget in seconds, retries and waits included."""

    def __init__(self, budget: float) -> None:
        if not budget > 0:
            raise InputError(f"timeout is {budget}; expected seconds above 0")
        self.budget = budget
        self.ends = time.monotonic() + budget

    def passed(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self.ends

    def left(self, url: str) -> float:
        """Seconds left, above 0. Raises DeadlineExceeded naming the server when there are none."""
        left = self.ends - time.monotonic()
        if left <= 0:
            raise deadline_exceeded(url, self.budget)
        return left


@dataclass(frozen=True)
class Retries:
    """At most `attempts` tries of one request, with waits drawn at random below a bound that doubles each time.

    Only what is safe and may help is tried again: no connection, a connection that broke, UNAVAILABLE, HTTP 502 and 503.
    An inference changes no state on the server, so that one which may have been answered is sent again. A refusal (4xx,
    INVALID_ARGUMENT) and a deadline are final. The random wait ("full jitter") spreads the requests of all clients after a
    restart of the server; the server's Retry-After is added when the deadline allows it.
    first_wait, longest_wait: seconds.
    """

    attempts: int = 4
    first_wait: float = 0.1
    longest_wait: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 <= self.first_wait <= self.longest_wait:
            raise InputError(f"{self} is not usable; expected attempts >= 1 and 0 <= first_wait <= longest_wait")

    def policy(self, deadline: Deadline) -> dict[str, Any]:
        """These rules as arguments of tenacity.Retrying and tenacity.AsyncRetrying."""
        # The clock of tenacity starts now, which is later than the deadline's.
        left = deadline.ends - time.monotonic()
        return {
            "retry": tenacity.retry_if_exception_type(Unavailable),
            "stop": tenacity.stop_after_attempt(self.attempts) | tenacity.stop_before_delay(max(left, 0.0)),
            "wait": self._wait,
            "retry_error_callback": _give_up,
        }

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.pause if isinstance(error, Unavailable) else None
        bound = min(self.longest_wait, self.first_wait * 2 ** (state.attempt_number - 1))
        wait = random.uniform(0, bound)
        return wait if asked is None else asked + wait


def _give_up(state: tenacity.RetryCallState) -> NoReturn:
    """Raise the last failure, with the number of attempts."""
    error = state.outcome.exception() if state.outcome else None
    if not isinstance(error, Unavailable):  # pragma: no cover - tenacity calls this after a failure alone
        raise RuntimeError("nothing that is tried again failed")
    if state.attempt_number == 1:
        raise error
    tried = f"tried {state.attempt_number} times in {state.seconds_since_start or 0:.1f} s"
    raise Unavailable(f"{error}; {tried}", error.pause) from error.__cause__
