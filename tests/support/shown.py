"""Read a run from the API of Prefect's server, as Prefect's pages do."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.evaluation.comparison import Measure
from pipeline.flows.prefect_artifacts import comparison_rows


@dataclass(frozen=True)
class ShownRun:
    """A flow run: name, name of its state, artifacts by key."""

    name: str
    state: str
    artifacts: dict[str, Any]


def last_run(api: str) -> ShownRun:
    """Return the flow run that started last."""
    (run,) = _ask(api, "flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    artifacts = _ask(api, "artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    return ShownRun(run["name"], run["state"]["name"], {artifact["key"]: artifact["data"] for artifact in artifacts})


def check_refusal(shown: ShownRun, evidence: Path) -> None:
    """Assert that a refused run has the name of its data and code, a comparison table, a report link, a decision."""
    story, decision = (json.loads((evidence / name).read_text()) for name in ("retrain.json", "decision.json"))
    revision, changed, _ = story["code_revision"].partition("+")
    assert shown.name == f"data {story['data_sha256'][:8]} code {revision[:8]}{changed}"
    assert shown.state == "Refused"
    expected = {"decision", "outcome"}
    assert shown.artifacts["decision"].startswith("# Refuse\n")
    for reason in decision["reasons"]:
        assert f"- {reason}" in shown.artifacts["decision"] and reason in shown.artifacts["outcome"]
    assert ("could not be computed" in shown.artifacts["decision"]) is not decision["computed"]
    if decision["computed"]:
        rows = comparison_rows({name: Measure(**measure) for name, measure in decision["measures"].items()})
        assert json.loads(shown.artifacts["comparison"]) == rows
        assert {"refused", "passed"} <= {row["verdict"] for row in rows}
        expected.add("comparison")
    if (evidence / "report.html").is_file():
        assert shown.artifacts["report"] == f"[report of the challenger]({(evidence / 'report.html').as_uri()})"
        expected.add("report")
    assert set(shown.artifacts) == expected


def _ask(api: str, path: str, query: dict[str, Any]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{api}/{path}", json.dumps(query).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)
