"""Runs recorded in MLflow exactly once; nothing is lost while MLflow is unreachable."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from pipeline.params import Params
from pipeline.report.mlflow_record import TrackingError, collect_run, flatten, record_after_stage, record_run, run
from pipeline.shared.errors import ParamsError, StageError
from tests.support.making import params, write

pytestmark = pytest.mark.slow

SCORES = {"all": 0.9, "many": 0.95, "few": None, "at_target_prior": {"ece": 0.04}}
METRICS = {network: {"balanced": SCORES, "train": SCORES} for network in ("teacher", "student")}
MANIFEST = {"data_sha256": "d" * 64, "params_sha256": "p" * 64, "code_revision": "abc123", "version": 1}


@pytest.fixture(autouse=True)
def finished_run(tmp_path, monkeypatch):
    """Write the artifacts of a run that are recorded."""
    monkeypatch.chdir(tmp_path)
    write(Path("artifacts/evaluation/metrics.json"), json.dumps(METRICS).encode())
    write(Path("artifacts/evaluation/report.html"), b"<html>")
    write(Path("artifacts/export/manifest.json"), json.dumps(MANIFEST).encode())
    for network in ("teacher", "student"):
        write(Path(f"artifacts/{network}/history.csv"), b"epoch,loss,tau_g\n1,2.5,\n2,1.5,0.1\n")


def params_with(uri: str, **changes) -> Params:
    return params({"tracking.mlflow": uri, "tracking.experiment": "cloth", **changes})


@pytest.fixture
def store(tmp_path) -> str:
    return (tmp_path / "mlruns").as_uri()


def runs(uri: str) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    return client.search_runs([client.get_experiment_by_name("cloth").experiment_id])


def test_a_run_is_recorded_with_its_params_metrics_curves_files_and_hashes(store):
    from mlflow import MlflowClient

    address = record_run(params_with(store))
    (recorded,) = runs(store)
    assert recorded.info.run_id in address and recorded.info.status == "FINISHED"
    assert recorded.data.params["student.tau_g"] == "0.1" and recorded.data.params["image.mean"] == "[0.5, 0.5, 0.5]"
    assert not [name for name in recorded.data.params if name.startswith("tracking")]
    assert recorded.data.metrics["student.balanced.all"] == 0.9
    assert recorded.data.metrics["teacher.train.at_target_prior.ece"] == 0.04
    assert "student.balanced.few" not in recorded.data.metrics  # an empty group has no score
    client = MlflowClient(tracking_uri=store)
    losses = client.get_metric_history(recorded.info.run_id, "student.loss")
    assert [(point.step, point.value) for point in losses] == [(1, 2.5), (2, 1.5)]
    assert [point.step for point in client.get_metric_history(recorded.info.run_id, "teacher.tau_g")] == [2]
    assert {file.path for file in client.list_artifacts(recorded.info.run_id)} == {
        "report.html", "metrics.json", "manifest.json",
    }  # fmt: skip
    assert (
        recorded.data.tags["tailor.data_sha256"] == "d" * 64 and recorded.data.tags["tailor.code_revision"] == "abc123"
    )


def test_each_release_is_recorded_once(store):
    first = record_run(params_with(store))
    assert record_run(params_with(store)) == first and len(runs(store)) == 1
    write(Path("artifacts/export/manifest.json"), json.dumps(MANIFEST | {"data_sha256": "e" * 64}).encode())
    record_run(params_with(store))
    assert len(runs(store)) == 2


def test_a_partly_recorded_run_is_recorded_again(store, monkeypatch):
    from mlflow import MlflowClient

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(TrackingError, match="the disk is full"):
            record_run(params_with(store))
    assert [recorded.info.status for recorded in runs(store)] == ["RUNNING"]
    record_run(params_with(store))
    assert [recorded.info.status for recorded in runs(store)] == ["FINISHED"]


def test_an_unreachable_server_gives_one_line_without_the_password(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    unreachable = params_with(f"http://me:secret@127.0.0.1:{port}")
    with pytest.raises(TrackingError) as caught:
        record_run(unreachable)
    assert "secret" not in str(caught.value) and f"127.0.0.1:{port}" in str(caught.value)
    record_after_stage("export", unreachable)
    printed = capsys.readouterr().err
    assert (
        printed.count("\n") == 1
        and "secret" not in printed
        and "`python -m pipeline.report.mlflow_record` records it later" in printed
    )


# pragma: allowlist nextline secret
@pytest.mark.parametrize("database", ["sqlite:///{folder}", "postgresql://me:secret@127.0.0.1:1/runs"])
def test_an_unreachable_database_or_a_missing_driver_gives_one_line(database, tmp_path, monkeypatch, capsys):
    store = pytest.importorskip("mlflow.store.db.utils", exc_type=ImportError)
    monkeypatch.setattr(store, "MAX_RETRY_COUNT", 1)
    record_after_stage("export", params_with(database.format(folder=tmp_path)))
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("export: tracking.mlflow '") and "did not accept the run: " in printed
    assert "secret" not in printed


def test_without_a_tracking_uri_nothing_is_recorded_and_mlflow_is_not_imported(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
        monkeypatch.delitem(sys.modules, name)
    assert record_run(params()) is None
    record_after_stage("export", params())
    assert capsys.readouterr().err == "" and "mlflow" not in sys.modules
    with pytest.raises(ParamsError, match=r"tracking\.mlflow is null"):
        run(params())


def test_without_mlflow_the_error_names_the_extra(monkeypatch, store):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ParamsError, match=r"pip install -e '\.\[mlflow\]'"):
        record_run(params_with(store))


def test_a_deleted_experiment_is_named(store):
    from mlflow import MlflowClient

    record_run(params_with(store))
    client = MlflowClient(tracking_uri=store)
    client.delete_experiment(client.get_experiment_by_name("cloth").experiment_id)
    with pytest.raises(TrackingError, match=r"tracking\.experiment is 'cloth', which was deleted"):
        record_run(params_with(store))


def test_a_missing_or_damaged_export_is_named(store):
    path = Path("artifacts/export/manifest.json")
    path.write_text("{")
    with pytest.raises(StageError, match=r"manifest\.json: damaged"):
        record_run(params_with(store))
    path.unlink()
    with pytest.raises(ParamsError, match="run `dvc repro` first"):
        record_run(params_with(store))


def test_the_recorded_data_location_has_no_password():
    made = params({"data.source": "table", "data.location": "s3://key:secret@bucket/cloth"})
    assert "secret" not in json.dumps(collect_run(made).params)


def test_flatten_keeps_every_leaf_under_its_dotted_key():
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": None}}}) == {"a": 1, "b.c": 2, "b.d.e": None}
