"""The result of a load test by model version, and whether it is within the thresholds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from serving.load.plan import LoadPlan

VERSION = re.compile(r"version (\d+), (\w+)")


@dataclass(frozen=True)
class Measured:
    """Requests of one kind, or all: number, failures, requests per second, response time in milliseconds."""

    name: str
    requests: int
    failures: int
    rps: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Verdict:
    """A finished test: the total, each kind of request, and each missed threshold in words."""

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


def judge(total: Measured, kinds: Iterable[Measured], plan: LoadPlan) -> Verdict:
    """Compare the measurement with the plan's thresholds; a test in which no request was answered has failed."""
    missed = []
    share = total.failures / total.requests if total.requests else 1.0
    answered = total.requests > total.failures
    if not answered:
        missed.append(f"no request was answered, of {total.requests} sent")
    elif share > plan.max_failures:
        missed.append(f"failures {share:.2%}, allowed {plan.max_failures:.2%}")
    if answered and plan.max_p99 is not None and not total.p99_ms <= plan.max_p99:
        missed.append(f"p99 {total.p99_ms:.0f} ms, allowed {plan.max_p99:g} ms")
    rps = total.rps * (1 - share)
    if answered and plan.min_rps is not None and not rps >= plan.min_rps:
        missed.append(f"{rps:.1f} answers/s, required {plan.min_rps:g}")
    return Verdict(total, tuple(kinds), tuple(missed))


def is_answer(name: str) -> bool:
    """Whether a kind of request, by its name, was answered with a prediction."""
    return VERSION.search(name) is not None


def request_name(version: int | None, label: str) -> str:
    """The name of a kind of request in the reports: the version that answered and the requested prior."""
    return f"version {version}, {label}" if version is not None else f"no answer, {label}"
