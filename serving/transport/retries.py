"""Retry policy and deadline of a request: which errors are retried, number of attempts, waits, total time."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any, NoReturn

import tenacity

from serving.shared.errors import InputError
from serving.transport.failures import ProcessUnhealthy, Unavailable, deadline_exceeded


class Deadline:
    """The deadline of one call. budget: its seconds, including retries and waits."""

    def __init__(self, budget: float) -> None:
        if not budget > 0:
            raise InputError(f"timeout is {budget}; expected seconds above 0")
        self.budget = budget
        self.ends = time.monotonic() + budget

    def passed(self) -> bool:
        """Return whether no time remains."""
        return time.monotonic() >= self.ends

    def remaining(self, url: str) -> float:
        """Return the remaining seconds, above 0. Raises DeadlineExceeded naming the server when none remain."""
        remaining = self.ends - time.monotonic()
        if remaining <= 0:
            raise deadline_exceeded(url, self.budget)
        return remaining


@dataclass(frozen=True)
class Retries:
    """Retry policy: at most `attempts` attempts, exponential backoff with full jitter.

    Retried: no connection, a broken connection, UNAVAILABLE, HTTP 502 and 503, an inference process that did not react. An
    inference changes no state on the server, so a request whose response was lost is retried too. A rejected request (4xx,
    INVALID_ARGUMENT) and a passed deadline are final. The random wait spreads the requests of all clients after a server
    restart; the server's Retry-After is added when the deadline allows it.
    first_wait, longest_wait: bounds of the wait in seconds. unhealthy: False for a health check, which has to report an
    inference process that did not react although another one would answer a retry.
    """

    attempts: int = 4
    first_wait: float = 0.1
    longest_wait: float = 2.0
    unhealthy: bool = True

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 <= self.first_wait <= self.longest_wait:
            raise InputError(f"{self} is not usable; expected attempts >= 1 and 0 <= first_wait <= longest_wait")

    def policy(self, deadline: Deadline) -> dict[str, Any]:
        """Return the policy as arguments of tenacity.Retrying and tenacity.AsyncRetrying."""
        # tenacity's clock starts now, later than that of the deadline.
        remaining = max(deadline.ends - time.monotonic(), 0.0)
        return {
            "retry": tenacity.retry_if_exception(self._retried),
            "stop": tenacity.stop_after_attempt(self.attempts) | tenacity.stop_before_delay(remaining),
            "wait": self._wait,
            "retry_error_callback": _raise_last_error,
        }

    def _retried(self, error: BaseException) -> bool:
        return isinstance(error, Unavailable) and (self.unhealthy or not isinstance(error, ProcessUnhealthy))

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        retry_after = error.pause if isinstance(error, Unavailable) else None
        bound = min(self.longest_wait, self.first_wait * 2 ** (state.attempt_number - 1))
        return random.uniform(0, bound) + (retry_after or 0.0)


def _raise_last_error(state: tenacity.RetryCallState) -> NoReturn:
    """Raise the last error, with the number of attempts."""
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, Unavailable)  # the only error that is retried
    if state.attempt_number == 1:
        raise error
    attempts = f"tried {state.attempt_number} times in {state.seconds_since_start or 0:.1f} s"
    raise type(error)(f"{error}; {attempts}", error.pause) from error.__cause__
