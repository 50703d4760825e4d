"""Rules of the retraining flow: one run at a time, retries, valid schedules."""

from __future__ import annotations

import multiprocessing
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from prefect.states import Failed

from pipeline.evaluation.comparison import Measure
from pipeline.evaluation.predictions import GateError
from pipeline.flows.dvc_stages import StageFailed
from pipeline.flows.prefect_artifacts import comparison_rows
from pipeline.flows.records import DecisionRecord, RunRecord, gate_sha256, now, write_run
from pipeline.flows.retraining import RunInProgress, run_lock
from pipeline.flows.tasks import publish, run_gate, should_retry, task_options
from pipeline.params import GateParams
from pipeline.scheduling.schedule import run_schedule
from pipeline.shared.errors import ParamsError, StageError
from serving.promotion.promotion import PromotionError
from serving.repository.manifest import ManifestError
from tests.support.making import content, params

pytestmark = pytest.mark.slow


def hold_lock(folder, locked):
    import os

    os.chdir(folder)
    with run_lock("refuse", print):
        locked.set()
        time.sleep(60)


@pytest.fixture
def other_run(tmp_path, monkeypatch):
    """Start another process that holds the lock until it is stopped."""
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context("spawn")
    locked = context.Event()
    process = context.Process(target=hold_lock, args=(str(tmp_path), locked))
    process.start()
    assert locked.wait(60)
    write_run(RunRecord(now().isoformat(), None, "why", process.pid, None))
    yield process
    process.kill()
    process.join()


@pytest.mark.fault_case("two-runs")
def test_a_second_run_is_refused_or_waits_for_the_first_to_exit(other_run):
    process = other_run
    refused = pytest.raises(
        RunInProgress, match=rf"another retraining is in progress \(process {process.pid}, since 20"
    )
    with refused, run_lock("refuse", print):
        pass
    messages = []
    acquired = threading.Event()

    def wait() -> None:
        with run_lock("wait", messages.append):
            acquired.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not acquired.wait(0.3)
    process.kill()  # its lock ends with it
    assert acquired.wait(30)
    thread.join()
    assert messages[0].startswith("waits for another retraining (process")
    with run_lock("refuse", print):
        pass


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (StageFailed("killed", -9), True),
        (StageFailed("no space", 1), True),
        (StageFailed("lock", None), True),
        (StageFailed("a bad parameter", 2), False),
        (ParamsError("a bad parameter"), False),
        (GateError("cannot be computed"), False),
        (ManifestError("hash"), False),
        (PromotionError("Triton went away"), True),
        (OSError(28, "No space left on device"), True),
        (StageError("dvc is busy"), True),
    ],
)
def test_only_errors_that_a_retry_can_fix_are_retried(error, retried):
    assert should_retry(None, None, Failed(data=error)) is retried


def test_every_task_except_the_gate_is_retried():
    made = params({"retrain.retries": 3})
    assert (task_options(made, publish)["retries"], task_options(made, run_gate)["retries"]) == (3, 0)


@pytest.mark.parametrize(
    ("cron", "timezone", "message"),
    [
        ("0 3 * *", None, r"--cron is '0 3 \* \*'; expected five fields"),
        ("61 3 * * *", None, r"--cron is '61 3 \* \* \*'; expected five fields"),
        ("0 3 * * *", "Mars/Olympus", "--timezone is 'Mars/Olympus'; expected an IANA name such as Europe/London"),
        ("0 3 * * *", "../../etc/passwd", "--timezone is .*; expected an IANA name"),
    ],
)
def test_an_invalid_schedule_is_refused_before_a_process_is_started(tmp_path, monkeypatch, cron, timezone, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    Path("params.yaml").write_text(yaml.safe_dump(content()))
    with pytest.raises(ParamsError, match=message):
        run_schedule(cron, timezone, print, home=tmp_path / ".prefect")
    assert not (tmp_path / ".prefect").exists()


def test_the_comparison_shows_a_missing_value_as_a_dash():
    measures = {
        "all": Measure(0.9, 0.95, 0.05, 0.01, 0.09, 0.02, "beyond_noise", 0.0, True),
        "latency_ms": Measure(None, None, None, None, None, None, "none", 0.0, None),
    }
    assert comparison_rows(measures) == [
        {"measure": "all", "champion": "0.9000", "challenger": "0.9500", "difference": "+0.0500",
         "interval": "+0.0100 to +0.0900", "McNemar p": "0.02", "rule": "beyond_noise, margin 0", "verdict": "passed"},
        {"measure": "latency_ms", "champion": "–", "challenger": "–", "difference": "–", "interval": "–",
         "McNemar p": "–", "rule": "none", "verdict": "–"},
    ]  # fmt: skip


def test_the_comparison_marks_a_measure_with_too_few_test_images():
    measure = Measure(0.5, 0.5, 0.0, 0.0, 0.0, 1.0, "estimate", 0.0, None, 8, 8.0)
    (row,) = comparison_rows({"few": measure})
    assert row["verdict"] == "too few images"
    assert (
        comparison_rows({"few": replace(measure, images=160, effective=160.0, passed=True)})[0]["verdict"] == "passed"
    )


def test_an_undecided_release_is_decided_again_only_with_another_champion_or_gate():
    gate = GateParams()
    undecided = DecisionRecord("release", 3, gate_sha256(gate), "undecided", None)
    assert undecided.already_decided("release", 3, gate) and not undecided.already_decided("release", 4, gate)
    other = GateParams.model_validate({"few": {"rule": "none"}})
    assert not undecided.already_decided("release", 3, other)
