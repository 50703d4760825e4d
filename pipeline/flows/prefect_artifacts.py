"""Report a run to Prefect's UI: its name, the comparison as a table, the report, the decision.

Reporting is best effort: after the first failed request the run continues and sends no more reports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run

from pipeline.evaluation.comparison import Measure
from pipeline.evaluation.gate import Decision
from pipeline.flows.records import Outcome


class PrefectReporter:
    """Sends reports of one run to Prefect's server until a request fails."""

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._logger = logger
        self._unreachable = False

    def report_name(self, name: str) -> None:
        """Set the name of the flow run."""

        def rename() -> None:
            with get_client(sync_client=True) as client:
                client.update_flow_run(flow_run.get_id(), name=name)

        self._send(rename)

    def report_decision(self, decision: Decision, evidence: Path) -> None:
        """Send the comparison, the report and the decision as artifacts."""
        if decision.measures:
            self._send(lambda: create_table_artifact(comparison_rows(decision.measures), "comparison", str(decision)))
        report = (evidence / "report.html").absolute()
        if report.is_file():
            self._send(lambda: create_link_artifact(report.as_uri(), "report of the challenger", "report"))
        self._send(lambda: create_markdown_artifact(_as_markdown(decision), "decision"))

    def report_outcome(self, outcome: Outcome) -> None:
        """Send the outcome of the run as an artifact."""
        self._send(lambda: create_markdown_artifact(f"**{outcome.ending}**: {outcome.message}", "outcome"))

    def _send(self, request: Callable[[], Any]) -> None:
        if self._unreachable:
            return
        try:
            request()
        except (httpx.HTTPError, PrefectException) as error:
            self._unreachable = True
            self._logger.warning("no more reports are sent to Prefect's server: %s", " ".join(str(error).split()))


def comparison_rows(measures: dict[str, Measure]) -> list[dict[str, str]]:
    """Format the measures as rows of text: champion, challenger, difference, interval, McNemar's p, rule, verdict."""
    return [
        {
            "measure": name,
            "champion": _number(measure.champion),
            "challenger": _number(measure.challenger),
            "difference": _number(measure.difference, "+.4f"),
            "interval": "–" if measure.low is None else f"{measure.low:+.4f} to {measure.high:+.4f}",
            "McNemar p": _number(measure.mcnemar, ".3g"),
            "rule": measure.rule if measure.rule == "none" else f"{measure.rule}, margin {measure.margin:g}",
            "verdict": _verdict(measure),
        }
        for name, measure in measures.items()
    ]


def _verdict(measure: Measure) -> str:
    if measure.rule != "none" and measure.too_few:
        return "too few images"
    return {True: "passed", False: "refused", None: "–"}[measure.passed]


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def _as_markdown(decision: Decision) -> str:
    lines = [f"# {decision.verdict.capitalize()}", ""]
    if not decision.computed:
        lines += ["The gate could not be computed, which is a refusal.", ""]
    return "\n".join([*lines, *(f"- {reason}" for reason in decision.reasons)])
