"""What a run was and how it did, told to whatever keeps records besides DVC: params, metrics, curves, report, manifest."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.artifacts import EVALUATION, EXPORT, STUDENT, TEACHER, sha256_of
from pipeline.errors import ParamsError, StageError
from pipeline.params import Params
from pipeline.sources.storage import shown
from pipeline.stage import stage_main
from serving.terminal import print

EVALUATED = ("report.html", "metrics.json", "per_class.csv", "confusion.csv")
EXPORTED = ("manifest.json", "model_card.md")
HISTORIES = {"teacher": TEACHER / "history.csv", "student": STUDENT / "history.csv"}
NOT_TOLD = {"tracking", "device"}  # an address may hold a password; where a run ran is no part of it


class TrackingError(StageError):
    """A run could not be told; everything else of it is there, and it can be told later."""


@dataclass(frozen=True)
class Run:
    """One run as it is told.

    release: sha256 of its manifest, by which it is told once however often it is asked for. params and metrics by dotted
    key. curves: (metric, epoch, value). files: to be kept with it. tags: what else is to be known, such as the decision.
    """

    name: str
    release: str
    params: dict[str, str]
    metrics: dict[str, float]
    curves: list[tuple[str, int, float]]
    files: list[Path]
    tags: dict[str, str]


class Sink(Protocol):
    """Whatever keeps records of runs."""

    def tell(self, run: Run) -> str:
        """Keep the run; one that is kept already gets the new tags alone. Returns where it is seen. Raises TrackingError."""
        ...


def sinks(params: Params) -> list[Sink]:
    """The sinks that params.tracking names. Raises ParamsError where a package is missing."""
    if params.tracking.mlflow is None:
        return []
    from pipeline.mlflow_sink import MlflowSink  # of the extra `mlflow`

    return [MlflowSink(params.tracking.mlflow, params.tracking.experiment)]


def track(params: Params, tags: Mapping[str, str] | None = None, export: Path = EXPORT) -> list[str]:
    """Tell the run whose artifacts lie here to every sink; where it is seen in each.

    tags: further facts, such as {"tailor.decision": "promote"}. Raises ParamsError when nothing was exported yet,
    TrackingError when a sink does not take it.
    """
    found = sinks(params)
    return [sink.tell(run) for run in [collect(params, tags, export)] for sink in found] if found else []


def tell_after(stage: str, params: Params, export: Path = EXPORT) -> None:
    """`track` at the end of a stage, whose result is whole: a sink that is away is said on stderr, and costs nothing else."""
    try:
        for place in track(params, export=export):
            print(f"{stage}: told to {place}", file=sys.stderr)
    except StageError as error:
        print(f"{stage}: {error}; `python -m pipeline.tracking` tells it later", file=sys.stderr)


def collect(params: Params, tags: Mapping[str, str] | None = None, export: Path = EXPORT) -> Run:
    """The run whose artifacts lie here. Raises ParamsError when there are none, StageError for a damaged one."""
    path = export / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        metrics = json.loads((EVALUATION / "metrics.json").read_text(encoding="utf-8"))
        facts = {key: str(manifest[key]) for key in ("data_sha256", "params_sha256", "code_revision")}
    except OSError as error:
        raise ParamsError(f"{error.filename}: {error.strerror}; run `dvc repro` first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path}: damaged ({error}); run `dvc repro -f export`") from None
    release = sha256_of(path)
    content = params.model_dump(mode="json", exclude=NOT_TOLD)
    files = [EVALUATION / name for name in EVALUATED] + [export / name for name in EXPORTED]
    content["data"]["location"] = shown(params.data.location)
    return Run(
        f"{params.data.source} {release[:8]}",
        release,
        {
            key: json.dumps(value) if isinstance(value, list | None) else str(value)
            for key, value in flat(content).items()
        },
        {key: float(value) for key, value in flat(metrics).items() if isinstance(value, int | float)},
        [point for network, history in HISTORIES.items() for point in _curve(network, history)],
        [file for file in files if file.is_file()],
        {"tailor.release": release, **{f"tailor.{key}": value for key, value in facts.items()}, **(tags or {})},
    )


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted key."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _curve(network: str, path: Path) -> list[tuple[str, int, float]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return [
            (f"{network}.{name}", int(row["epoch"]), float(value))
            for row in csv.DictReader(stream)
            for name, value in row.items()
            if name != "epoch" and value
        ]


def run(params: Params) -> str:
    """`track`, in a sentence. Raises ParamsError where params name no sink."""
    places = track(params)
    if not places:
        raise ParamsError("tracking.mlflow is null; set it to a tracking URI such as http://127.0.0.1:5000")
    return f"told to {', '.join(places)}"


if __name__ == "__main__":
    sys.exit(stage_main(run, "Tell the run whose artifacts lie here to the sinks of params.tracking."))
