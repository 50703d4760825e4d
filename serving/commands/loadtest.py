"""`tailor loadtest`: load test of a running server, checked against thresholds."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from serving.commands.options import (
    AsJson,
    CaFile,
    Debug,
    Headers,
    ProtocolOption,
    Url,
    parse_headers,
    print_json,
    server_url,
)
from serving.loadtest.plan import LoadPlan
from serving.loadtest.run import run
from serving.shared.errors import ServingError
from serving.shared.terminal import Console, cell
from serving.transport.connection import Connection


def loadtest(
    url: Url = None,
    protocol: ProtocolOption = None,
    header: Headers = None,
    ca_file: CaFile = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for the reports; a new one in artifacts/loadtest if not given.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Put load on a running server, and check thresholds.

    The load comes from Locust. The exit status is 1 when a threshold is not met. Starts no server.
    """
    plan = LoadPlan(Connection(server_url(url, protocol), parse_headers(header), ca_file), **options)
    folder = report or Path("artifacts/loadtest") / f"{time.strftime('%Y%m%d-%H%M%S')}-{plan.connection.protocol}"
    terminal = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bars:
        task = bars.add_task("load test", total=1.0)
        result = run(plan, folder, lambda part: bars.update(task, completed=part))
    if as_json:
        print_json({**result, "report": str(folder)})
    else:
        console = Console()
        console.print(load_table(result, plan.connection.url))
        console.print(f"reports in {folder}", highlight=False, soft_wrap=True)
    if not result["passed"]:
        raise ServingError(f"load test failed: {'; '.join(result['missed'])}")


# Typer reads the signature: replace `**options` with the fields of LoadPlan.
_OWN, _PLAN = ([*inspect.signature(each, eval_str=True).parameters.values()] for each in (loadtest, LoadPlan))
loadtest.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*_OWN[:-1], *_PLAN[1:])]
)


def load_table(result: Mapping[str, Any], url: str) -> Table:
    """Table of a load test: a row for each kind of request (by model version), and one for all requests."""
    table = Table(title=f"load on {cell(url)}: {'passed' if result['passed'] else 'failed'}")
    table.add_column("requests")
    for name in ("number", "failed", "per second", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right")
    for kind in [*result["kinds"], result["total"]]:
        if kind is result["total"]:
            table.add_section()
        counts = (f"{kind['requests']}", f"{kind['failures']}", f"{kind['rps']:.1f}")
        table.add_row(cell(kind["name"]), *counts, f"{kind['p50_ms']:.0f}", f"{kind['p99_ms']:.0f}")
    if result["generator_saturated"]:
        table.caption = "Locust used over 90% of a core and may be the limit; add --workers"
    return table
