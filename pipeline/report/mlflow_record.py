"""Record a run in MLflow: params, metrics, curves, report and manifest of the artifacts in the working folder."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.command_line import stage_main
from pipeline.params import Params, TrackingParams
from pipeline.shared.artifacts import EVALUATION, EXPORT, STUDENT, TEACHER, sha256_of
from pipeline.shared.errors import ParamsError, StageError, install_command
from pipeline.sources.storage import redact_url
from serving.shared.terminal import print

EVALUATION_FILES = ("report.html", "metrics.json", "per_class.csv", "confusion.csv")
EXPORT_FILES = ("manifest.json", "model_card.md")
HISTORIES = {"teacher": TEACHER / "history.csv", "student": STUDENT / "history.csv"}
NOT_LOGGED = {"tracking", "device"}  # an address may hold a password; the device is not part of the recipe
RELEASE_TAG = "tailor.release"
BATCH_SIZES = {"metrics": 1000, "params": 100}  # MLflow's limits per request
# MLflow reads these when it is imported; values set by the user take precedence. No telemetry; requests to an
# unreachable server fail after seconds, not minutes; a local folder is accepted as the store.
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ALLOW_FILE_STORE": "true",
}


class TrackingError(StageError):
    """MLflow did not accept a run. The artifacts are complete, and the run can be recorded later."""


@dataclass(frozen=True)
class MlflowRun:
    """One run as it is recorded in MLflow.

    release: sha256 of its manifest; a release is recorded once. params, metrics: by dotted key. curves: (metric, epoch,
    value). files: uploaded as artifacts. tags: hashes of release, data and params, and the code revision.
    """

    name: str
    release: str
    params: dict[str, str]
    metrics: dict[str, float]
    curves: list[tuple[str, int, float]]
    files: list[Path]
    tags: dict[str, str]


def record_run(params: Params, export: Path = EXPORT) -> str | None:
    """Record the run of the working folder. Returns its address in MLflow; None if tracking.mlflow is null.

    Raises ParamsError if there is no export yet or mlflow is not installed, TrackingError if MLflow does not accept the
    run.
    """
    if params.tracking.mlflow is None:
        return None
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    uri, address = params.tracking.mlflow, redact_url(params.tracking.mlflow)
    try:
        from mlflow import MlflowClient  # of the extra `mlflow`
        from mlflow.exceptions import MlflowException
    except ModuleNotFoundError as error:
        raise ParamsError(
            f"tracking.mlflow is {address!r}, but {error.name} is not installed; {install_command('mlflow')}"
        ) from None
    run = collect_run(params, export)
    try:
        # A separate client does not change MLflow's global state, so runs of the user in this process are unaffected.
        return _record(MlflowClient(tracking_uri=uri), params.tracking, run)
    except (MlflowException, OSError, ImportError, *_database_errors()) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrackingError(
            f"tracking.mlflow {address!r} did not accept the run: {reason.replace(uri, address)}"
        ) from None


def record_after_stage(stage: str, params: Params, export: Path = EXPORT) -> None:
    """Call `record_run` at the end of a stage; an error is printed to stderr, and the stage does not fail."""
    try:
        if address := record_run(params, export):
            print(f"{stage}: recorded at {address}", file=sys.stderr)
    except StageError as error:
        print(f"{stage}: {error}; `python -m pipeline.report.mlflow_record` records it later", file=sys.stderr)


def collect_run(params: Params, export: Path = EXPORT) -> MlflowRun:
    """Collect the run from the artifacts. Raises ParamsError if a file is missing, StageError if one is damaged."""
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
    content = params.model_dump(mode="json", exclude=NOT_LOGGED)
    files = [EVALUATION / name for name in EVALUATION_FILES] + [export / name for name in EXPORT_FILES]
    content["data"]["location"] = redact_url(params.data.location)
    return MlflowRun(
        name=f"{params.data.source} {release[:8]}",
        release=release,
        params={k: json.dumps(v) if isinstance(v, list | None) else str(v) for k, v in flatten(content).items()},
        metrics={key: float(value) for key, value in flatten(metrics).items() if isinstance(value, int | float)},
        curves=[point for network, history in HISTORIES.items() for point in _curve(network, history)],
        files=[file for file in files if file.is_file()],
        tags={RELEASE_TAG: release, **{f"tailor.{key}": value for key, value in facts.items()}},
    )


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in content.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


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


def _record(client: Any, settings: TrackingParams, run: MlflowRun) -> str:
    """Record a run unless it is recorded already; a partial record of a killed process is deleted first."""
    experiment = _experiment_id(client, settings)
    for existing in client.search_runs([experiment], f"tags.`{RELEASE_TAG}` = '{run.release}'", max_results=50):
        if existing.info.status == "FINISHED":
            return _address(settings, experiment, existing.info.run_id)
        client.delete_run(existing.info.run_id)
    run_id = client.create_run(experiment, run_name=run.name, tags=run.tags).info.run_id
    _log(client, run_id, run)
    client.set_terminated(run_id, "FINISHED")
    return _address(settings, experiment, run_id)


def _log(client: Any, run_id: str, run: MlflowRun) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in run.metrics.items()]
    metrics += [Metric(name, value, now, epoch) for name, epoch, value in run.curves]
    params = [Param(name, value) for name, value in run.params.items()]
    for name, values in (("metrics", metrics), ("params", params)):
        for start in range(0, len(values), BATCH_SIZES[name]):
            client.log_batch(run_id, **{name: values[start : start + BATCH_SIZES[name]]})
    for file in run.files:
        client.log_artifact(run_id, str(file))


def _experiment_id(client: Any, settings: TrackingParams) -> str:
    experiment = client.get_experiment_by_name(settings.experiment)
    if experiment is None:
        return str(client.create_experiment(settings.experiment))
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment is {settings.experiment!r}, which was deleted at {redact_url(str(settings.mlflow))}; restore "
            "it, or name another"
        )
    return str(experiment.experiment_id)


def _address(settings: TrackingParams, experiment: str, run_id: str) -> str:
    address = redact_url(str(settings.mlflow))
    if address.startswith(("http://", "https://")):
        return f"{address.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
    return f"{address} (run {run_id})"


def _database_errors() -> tuple[type[Exception], ...]:
    """Database errors that MLflow does not wrap; from SQLAlchemy, which the extra `mlflow` does not install."""
    try:
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        return ()
    return (SQLAlchemyError,)


def run(params: Params) -> str:
    """Record the run and return a summary. Raises ParamsError if tracking.mlflow is null."""
    address = record_run(params)
    if not address:
        raise ParamsError("tracking.mlflow is null; set it to a tracking URI such as http://127.0.0.1:5000")
    return f"recorded at {address}"


if __name__ == "__main__":
    sys.exit(stage_main(run, "Record the run whose artifacts exist here in MLflow, at params.tracking."))
