"""What a load test found, by model version, and whether that is within the thresholds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from serving.load.plan import Thresholds

VERSION = re.compile(r"version (\d+), (\w+)")


@dataclass(frozen=True)
class Measured:
    """Requests of one kind, or all: number, failures, requests a second, milliseconds until what was answered was."""

    name: str
    requests: int
    failures: int
    rps: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Verdict:
    """A finished test: everything, each kind of request, and each threshold that was missed, in words."""

    total: Measured
    kinds: tuple[Measured, ...]
    missed: tuple[str, ...]

    def as_mapping(self) -> dict[str, object]:
        """As summary.json holds it; requests and failures by model version added."""
        versions: dict[str, dict[str, int]] = {}
        for kind in self.kinds:
            if found := VERSION.search(kind.name):
                version = versions.setdefault(found[1], {"requests": 0, "failures": 0})
                version["requests"] += kind.requests
                version["failures"] += kind.failures
                version[found[2]] = version.get(found[2], 0) + kind.requests
        return {**asdict(self), "versions": versions, "passed": not self.missed}


def judge(total: Measured, kinds: Iterable[Measured], thresholds: Thresholds) -> Verdict:
    """Hold what was measured against the thresholds; a test in which no request was answered has failed."""
    missed = []
    share = total.failures / total.requests if total.requests else 1.0
    answered = total.requests > total.failures
    if not answered:
        missed.append(f"no request was answered, of {total.requests} that were made")
    elif share > thresholds.failures:
        missed.append(f"failures {share:.2%}, allowed {thresholds.failures:.2%}")
    if answered and thresholds.p99_ms is not None and not total.p99_ms <= thresholds.p99_ms:
        missed.append(f"p99 {total.p99_ms:.0f} ms, allowed {thresholds.p99_ms:g} ms")
    rps = total.rps * (1 - share)
    if answered and thresholds.rps is not None and not rps >= thresholds.rps:
        missed.append(f"{rps:.1f} answers/s, asked for {thresholds.rps:g}")
    return Verdict(total, tuple(kinds), tuple(missed))


def is_answer(name: str) -> bool:
    """Whether a kind of request, by its name, was answered with a prediction."""
    return VERSION.search(name) is not None


def request_name(version: int | None, label: str) -> str:
    """What reports call a kind of request: the version that answered and the prior that was asked."""
    return f"version {version}, {label}" if version is not None else f"no answer, {label}"
