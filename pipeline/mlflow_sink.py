"""Runs told to MLflow: a server, a database, or a folder."""

from __future__ import annotations

import os
import time
from typing import Any

from pipeline.errors import ParamsError
from pipeline.sources.storage import shown
from pipeline.tracking import Run, TrackingError

RELEASE_TAG = "tailor.release"
AT_ONCE = {"metrics": 1000, "params": 100}  # MLflow's bounds of one call
# Read by MLflow when it is imported, unless the user has set them: no report to its makers; a server that is away is given
# up after seconds, not minutes; and a folder, which params.yaml named on purpose, is taken without a further switch.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ALLOW_FILE_STORE": "true",
}


class MlflowSink:
    """An experiment at a tracking URI. Raises ParamsError where mlflow is not installed.

    Nothing of MLflow's global state is used or changed, so that the user's own runs in the same process stay apart.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
        except ModuleNotFoundError as error:
            raise ParamsError(
                f"tracking.mlflow is {shown(uri)!r}, but {error.name} is not installed; pip install 'tailor[mlflow]'"
            ) from None
        self._uri, self._experiment, self._client_type = uri, experiment, MlflowClient

    def tell(self, run: Run) -> str:
        """As `Sink.tell`; a run that a killed process left half-told is deleted and told anew."""
        from mlflow.exceptions import MlflowException

        try:
            return self._tell(self._client_type(tracking_uri=self._uri), run)
        except (MlflowException, OSError, ImportError, *_database_errors()) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            reason = reason.replace(self._uri, shown(self._uri))
            raise TrackingError(f"tracking.mlflow {shown(self._uri)!r} did not take the run: {reason}") from None

    def _tell(self, client: Any, run: Run) -> str:
        experiment = self._experiment_id(client)
        kept = client.search_runs([experiment], f"tags.`{RELEASE_TAG}` = '{run.release}'", max_results=50)
        for found in kept:
            if found.info.status == "FINISHED":
                for key, value in run.tags.items():
                    client.set_tag(found.info.run_id, key, value)
                return self._place(experiment, found.info.run_id)
            client.delete_run(found.info.run_id)
        run_id = client.create_run(experiment, run_name=run.name, tags=run.tags).info.run_id
        self._log(client, run_id, run)
        client.set_terminated(run_id, "FINISHED")
        return self._place(experiment, run_id)

    def _log(self, client: Any, run_id: str, run: Run) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, 0) for name, value in run.metrics.items()]
        metrics += [Metric(name, value, now, epoch) for name, epoch, value in run.curves]
        params = [Param(name, value) for name, value in run.params.items()]
        for start in range(0, len(metrics), AT_ONCE["metrics"]):
            client.log_batch(run_id, metrics=metrics[start : start + AT_ONCE["metrics"]])
        for start in range(0, len(params), AT_ONCE["params"]):
            client.log_batch(run_id, params=params[start : start + AT_ONCE["params"]])
        for file in run.files:
            client.log_artifact(run_id, str(file))

    def _experiment_id(self, client: Any) -> str:
        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            return str(client.create_experiment(self._experiment))
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"tracking.experiment is {self._experiment!r}, which was deleted at {shown(self._uri)}; restore it, or "
                "name another"
            )
        return str(found.experiment_id)

    def _place(self, experiment: str, run_id: str) -> str:
        if self._uri.startswith(("http://", "https://")):
            return f"{shown(self._uri).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
        return f"{shown(self._uri)} (run {run_id})"


def _database_errors() -> tuple[type[Exception], ...]:
    """What MLflow lets through of a database; it is asked for by its own package, which the extra does not bring."""
    try:
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        return ()
    return (SQLAlchemyError,)
