"""`tailor loadtest`: load on a running server, and whether it held."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from serving.commands.options import (
    AsJson,
    CaFile,
    Debug,
    Headers,
    ProtocolOption,
    Url,
    address,
    parse_headers,
    print_json,
)
from serving.connection import Connection
from serving.display import load_table, overhead_line
from serving.errors import ServingError
from serving.load.plan import LoadPlan, Thresholds, seconds_of
from serving.load.shapes import SHAPES
from serving.loadtest import run
from serving.terminal import Console


def loadtest(
    url: Url = None,
    protocol: ProtocolOption = None,
    images: Annotated[Path, typer.Option(help="Folder of images to send, with the folders in it.")] = Path(
        "artifacts/evaluation/samples"
    ),
    users: Annotated[int, typer.Option(help="Users that ask at the same time, each waiting for its answer.")] = 16,
    time_span: Annotated[str, typer.Option("--time", help="How long: 90s, 10m, 1h30m.")] = "30s",
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second in all, sent whether or not answers come; without it users wait."),
    ] = None,
    shape: Annotated[
        str, typer.Option(metavar="|".join(SHAPES), help="Users over the time: all, in steps, a spike, or a soak.")
    ] = "constant",
    prior: Annotated[
        str, typer.Option(metavar="balanced|train|live|NUMBER|FILE", help="Prior of the adjusted requests.")
    ] = "train",
    adjusted_share: Annotated[float, typer.Option(help="Share of requests under --prior; the others balanced.")] = 0.5,
    batch: Annotated[int, typer.Option(help="Images in a request.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes that send; one is not enough for a fast model.")] = 1,
    max_p99: Annotated[
        float | None, typer.Option(help="Fail above this 99th percentile of the answers, in milliseconds.")
    ] = None,
    max_failures: Annotated[float, typer.Option(help="Fail above this share of failed requests, 0 to 1.")] = 0.0,
    min_rps: Annotated[float | None, typer.Option(help="Fail below this many answers per second.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for the reports; a new one in artifacts/loadtest if not given.")
    ] = None,
    overhead: Annotated[bool, typer.Option(help="Measure what the load generator itself costs, in 10 s more.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request has failed.")] = 10.0,
    header: Headers = None,
    ca_file: CaFile = None,
    allow_remote: Annotated[bool, typer.Option(help="Allow a server that is not on this machine.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Put load on a running server with Locust and judge it.

    Status 1 when a threshold is missed. Starts no server.
    """
    plan = LoadPlan(
        Connection(address(url, protocol), parse_headers(header), ca_file),
        images,
        users=users,
        seconds=seconds_of(time_span),
        rate=rate,
        shape=shape,
        prior=prior,
        adjusted_share=adjusted_share,
        batch=batch,
        workers=workers,
        timeout=timeout,
        allow_remote=allow_remote,
        thresholds=Thresholds(max_p99, max_failures, min_rps),
    )
    folder = report or Path("artifacts/loadtest") / f"{time.strftime('%Y%m%d-%H%M%S')}-{plan.connection.protocol}"
    found = _run_shown(plan, folder, overhead)
    if as_json:
        print_json({**found, "report": str(folder)})
    else:
        console = Console()
        console.print(load_table(found, plan.connection.url))
        console.print(overhead_line(found.get("overhead"), plan.users), highlight=False)
        console.print(f"reports in {folder}", highlight=False, soft_wrap=True)
    if not found["passed"]:
        raise ServingError(f"load test failed: {'; '.join(found['missed'])}")


def _run_shown(plan: LoadPlan, folder: Path, overhead: bool) -> dict[str, Any]:
    """Run the plan with a bar for each step, where there is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    terminal = Console(file=sys.stderr)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def show(step: str, part: float) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=1.0)
            bars.update(tasks[step], completed=part)

        return run(plan, folder, overhead, show)
