"""`tailor schedule`: retraining on a schedule, until it is told to end."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from serving.commands.options import Debug
from serving.terminal import print

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Example: tailor schedule --cron '0 3 * * *' --timezone Europe/London")
def schedule(
    cron: Annotated[str, typer.Option(help="When: minute, hour, day, month, weekday.")],
    timezone: Annotated[str | None, typer.Option(help="IANA name of the time zone; UTC if not given.")] = None,
    port: Annotated[int, typer.Option(help="Port of Prefect's server and its pages; 0 for any free one.")] = 4200,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Retrain on a schedule until SIGTERM or Ctrl-C.

    Runs a Prefect server on loopback, its database in .prefect/, or uses the one that PREFECT_API_URL names. The schedule
    survives a restart; of the runs that were missed meanwhile one is caught up. For a work pool of your own, see prefect.yaml.
    """
    from pipeline.flows.schedule import keep_schedule

    keep_schedule(cron, timezone, _say, port)


def _say(line: str) -> None:
    print(f"schedule: {line}", file=sys.stderr, flush=True)
