"""Result of a load test: measurements by model version, checked against the thresholds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serving.loadtest.plan import LoadPlan

VERSION = re.compile(r"version (\d+), (\w+)")  # in the names that request_name gives to requests with a response


@dataclass(frozen=True)
class Measurement:
    """Measurements of one kind of request, or of all: counts, requests per second, response times in milliseconds."""

    name: str
    requests: int
    failures: int
    rps: float
    p50_ms: float
    p99_ms: float


def check_thresholds(total: Measurement, kinds: Sequence[Measurement], plan: LoadPlan) -> dict[str, Any]:
    """Compare the measurements with the plan's thresholds; a test without any successful request fails.

    Returns the content of summary.json: the total, each kind of request, requests and failures by model version, a
    text for each violated threshold, and `passed`.
    """
    violations = []
    share = total.failures / total.requests if total.requests else 1.0
    answered = total.requests > total.failures
    if not answered:
        violations.append(f"no request succeeded, of {total.requests} sent")
    elif share > plan.max_failures:
        violations.append(f"failures {share:.2%}, allowed {plan.max_failures:.2%}")
    if answered and plan.max_p99 is not None and not total.p99_ms <= plan.max_p99:
        violations.append(f"p99 {total.p99_ms:.0f} ms, allowed {plan.max_p99:g} ms")
    rps = total.rps * (1 - share)
    if answered and plan.min_rps is not None and not rps >= plan.min_rps:
        violations.append(f"{rps:.1f} responses/s, required {plan.min_rps:g}")
    versions: dict[str, dict[str, int]] = {}
    for kind in kinds:
        if match := VERSION.search(kind.name):
            version = versions.setdefault(match[1], {"requests": 0, "failures": 0})
            version["requests"] += kind.requests
            version["failures"] += kind.failures
            version[match[2]] = version.get(match[2], 0) + kind.requests
    rows = {"total": asdict(total), "kinds": [asdict(kind) for kind in kinds]}
    return {**rows, "versions": versions, "missed": violations, "passed": not violations}


def request_name(version: int | None, label: str) -> str:
    """Return the name of a kind of request in the reports: model version and label of the prior."""
    return f"version {version}, {label}" if version is not None else f"no response, {label}"
