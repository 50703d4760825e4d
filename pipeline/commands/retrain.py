"""`tailor retrain`: new data in, a better model live, or nothing changed; once and now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.commands.options import AsJson, Debug, print_json
from serving.terminal import Console, cell, print

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Example: tailor retrain --because 'labels of class 7 were corrected'")
def retrain(
    because: Annotated[str, typer.Option(help="Why; kept with the decision.")] = "somebody asked",
    drop: Annotated[
        Path | None, typer.Option(help="Drop folder with new images; the recipe's ingest.drop if not given.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Ingest new data, retrain, and promote if the gate passes.

    What has not changed is not trained again. One run of the flow, here and now; Prefect's server is started for it
    unless one is there. Run it again after it was killed: it finishes what it began. The status is 0 where the run came
    to its end, be that promoted, refused, or nothing to do, and 1 where it failed or another run was under way.
    """
    from pipeline.flows.trigger import run_once

    outcome = run_once(because, drop, tracebacks=debug)
    if as_json:
        print_json({"ending": outcome.ending, "message": outcome.message, "version": outcome.version,
                    "evidence": outcome.evidence})  # fmt: skip
    else:
        _show(outcome.evidence)
        print(f"{outcome.ending}: {outcome.message}")
        if outcome.evidence:
            print(f"why: {outcome.evidence}/decision.json and report.html")
    return 1 if outcome.ending in ("failed", "busy") else 0


def _show(evidence: str | None) -> None:
    """The comparison of champion and challenger as a table."""
    import json

    from rich.table import Table

    from pipeline.comparison import Measure
    from pipeline.flows.telling import comparison

    path = Path(evidence or "") / "decision.json"
    if evidence is None or not path.is_file():
        return
    measures = json.loads(path.read_text(encoding="utf-8"))["measures"]
    rows = comparison({name: Measure(**measure) for name, measure in measures.items()})
    if rows:
        table = Table(title="challenger against champion", box=None, title_justify="left")
        shown = ("measure", "champion", "challenger", "difference", "interval", "verdict")  # what 80 columns hold
        for name in shown:
            table.add_column(name, no_wrap=True)
        for row in rows:
            table.add_row(*(cell(row[name]) for name in shown))
        Console().print(table)
