"""`tailor experiments`: list the runs that DVC stores, one line each, with metrics and changed params.

`dvc exp show` prints one column for each of several hundred params.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.table import Table

from pipeline.commands.options import TargetPrior
from pipeline.shared.artifacts import EVALUATION, PARAMS_FILE
from pipeline.shared.errors import StageError
from serving.commands.options import AsJson, Debug, print_json
from serving.shared.terminal import Console, cell

METRICS = ("all", "many", "medium", "few", "ece")


@dataclass(frozen=True)
class Experiment:
    """A run: `workspace`, a commit, or a DVC experiment with the commit that it started from (since).

    metrics: of the student on the test split; None for a metric that the run does not have. changed: params that differ
    from those of the commit.
    """

    name: str
    since: str | None
    created: str
    metrics: dict[str, float | None]
    changed: dict[str, Any]


def experiments(
    all_commits: Annotated[bool, typer.Option("--all-commits", help="Include the runs since every commit.")] = False,
    prior: Annotated[TargetPrior, typer.Option(help="Target prior of the metrics.")] = TargetPrior.balanced,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the runs that DVC stores, with metrics and params.

    The workspace, its newest commit, and the experiments since that commit: each `dvc exp run`, and each retraining that
    was promoted or refused. `dvc exp show` prints all params and all metrics of the same runs.
    """
    command = [sys.executable, "-P", "-m", "dvc", "exp", "show", "--json", *(["--all-commits"] if all_commits else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        cause = next((line for line in done.stderr.splitlines() if line.startswith("ERROR: ")), "ERROR: no output")
        raise StageError(f"dvc exp show failed: {cause.removeprefix('ERROR: ')}")
    runs = list(read_experiments(json.loads(done.stdout), f"{EVALUATION}/metrics/student_{prior.value}.json"))
    if as_json:
        print_json([asdict(run) for run in runs])
    else:
        Console().print(experiments_table(runs, prior.value))


def read_experiments(content: list[dict[str, Any]], metrics_file: str) -> Iterator[Experiment]:
    """The runs in the output of `dvc exp show --json`, each commit before its experiments."""
    head = next((_flat_params(entry["data"]) for entry in content[1:2]), {})
    for entry in content:
        if entry["rev"] == "workspace":
            yield _experiment("workspace", None, entry["data"], head, metrics_file)
            continue
        name, base = entry["name"] or entry["rev"][:7], _flat_params(entry["data"])
        yield _experiment(name, None, entry["data"], base, metrics_file)
        for experiment in entry["experiments"] or []:
            last = experiment["revs"][0]
            yield _experiment(last["name"] or last["rev"][:7], name, last["data"], base, metrics_file)


def _experiment(name: str, since: str | None, data: Any, base: Mapping[str, Any], metrics_file: str) -> Experiment:
    # DVC writes an error instead of the content of a run or file that it cannot read.
    metrics = ((data or {}).get("metrics", {}).get(metrics_file) or {}).get("data") or {}
    return Experiment(
        name,
        since,
        ((data or {}).get("timestamp") or "")[:16].replace("T", " "),
        {name: metrics.get(name) for name in METRICS},
        {key: value for key, value in _flat_params(data).items() if base and base.get(key) != value},
    )


def _flat_params(data: Any) -> dict[str, Any]:
    """Params of a run by dotted key; empty if DVC could not read them."""
    from dvc.utils.flatten import flatten

    return flatten(((data or {}).get("params", {}).get(str(PARAMS_FILE)) or {}).get("data") or {})


def experiments_table(runs: list[Experiment], prior: str) -> Table:
    """Table with one row per run, experiments indented below their commit; at most 120 columns wide."""
    table = Table(title=f"student on the test split, target prior {prior}", box=None, title_justify="left")
    for heading in ("run", "created", *METRICS):
        table.add_column(heading, no_wrap=True)
    table.add_column("changed params")
    for run in runs:
        name = f"  {run.name}" if run.since else run.name
        values = ("" if value is None else f"{value:.3f}" for value in run.metrics.values())
        changed = "  ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in run.changed.items())
        table.add_row(cell(name), run.created, *values, cell(changed))
    return table
