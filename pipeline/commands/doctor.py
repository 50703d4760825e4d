"""`tailor doctor`: health checks, from params to disk."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from pipeline.commands.options import ParamsOption, RepositoryOption, repository_of
from pipeline.shared.artifacts import PARAMS_FILE
from serving.commands.options import AsJson, Debug, print_json
from serving.shared.terminal import Console, cell

COLOURS = {"ok": "green", "warning": "yellow", "failing": "red"}


def doctor(
    repository: RepositoryOption = None,
    url: Annotated[str | None, typer.Option(help="Server to check; those of this machine if not given.")] = None,
    run_hours: Annotated[float, typer.Option(min=0, help="Warn when the last run began longer ago.")] = 48.0,
    champion_days: Annotated[float, typer.Option(min=0, help="Warn when the champion is older.")] = 30.0,
    disk_gib: Annotated[float, typer.Option(min=0, help="Warn when less is free on a disk.")] = 5.0,
    params: ParamsOption = PARAMS_FILE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Check everything that Tailor needs, from params to disk.

    Checks versions, params, server, champion, Prefect, worker, last run, ingest, disk. Each line is ok, warning or
    failing, with the remedy. Exit status 1 if a check is failing.
    """
    from pipeline.doctor.checks import Limits, examine

    findings = examine(params, repository_of(repository, params), url, Limits(run_hours, champion_days, disk_gib))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        table = Table(box=None, show_header=False)
        for finding in findings:
            text = cell(finding.message) + (f"\n[dim]→ {cell(finding.remedy)}[/dim]" if finding.remedy else "")
            table.add_row(finding.name, f"[{COLOURS[finding.state]}]{finding.state}[/]", text)
        Console().print(table)
    return 1 if any(finding.state == "failing" for finding in findings) else 0
