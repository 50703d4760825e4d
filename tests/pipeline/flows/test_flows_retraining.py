"""Rules of the retraining flow: one run at a time, retries, valid schedules."""

from __future__ import annotations

import multiprocessing
import threading
import time
from dataclasses import replace

import pytest
from prefect.states import Failed

from pipeline.evaluation.comparison import Measure
from pipeline.evaluation.predictions import GateError
from pipeline.flows.dvc_stages import StageFailed
from pipeline.flows.prefect_artifacts import comparison
from pipeline.flows.records import Decided, Run, gate_sha256, now, write_run
from pipeline.flows.retraining import Busy, one_at_a_time
from pipeline.flows.tasks import hold_gate, options, publish, worth_retrying
from pipeline.params import GateParams
from pipeline.scheduling.schedule import keep_schedule
from pipeline.shared.errors import ParamsError, StageError
from serving.promotion.promotion import PromotionError
from serving.repository.manifest import ManifestError
from tests.support.making import params

pytestmark = pytest.mark.slow


def hold(folder, taken):
    import os

    os.chdir(folder)
    with one_at_a_time("refuse", print):
        taken.set()
        time.sleep(60)


@pytest.fixture
def other_run(tmp_path, monkeypatch):
    """Start another process that holds the lock until it is stopped."""
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context("spawn")
    taken = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), taken))
    process.start()
    assert taken.wait(60)
    write_run(Run(now().isoformat(), None, "why", process.pid, None))
    yield process
    process.kill()
    process.join()


@pytest.mark.fault_case("two-runs")
def test_a_second_run_is_refused_and_told_of_the_first_waits_for_it_or_follows_its_death(other_run):
    process = other_run
    refused = pytest.raises(Busy, match=rf"another retraining is under way \(process {process.pid}, since 20")
    with refused, one_at_a_time("refuse", print):
        pass
    said = []
    waited = threading.Event()

    def wait() -> None:
        with one_at_a_time("wait", said.append):
            waited.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not waited.wait(0.3)
    process.kill()  # its lock ends with it
    assert waited.wait(30)
    thread.join()
    assert said[0].startswith("waits for another retraining (process")
    with one_at_a_time("refuse", print):
        pass


@pytest.mark.parametrize(
    ("error", "again"),
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
def test_what_may_do_better_is_tried_again_and_what_cannot_is_not(error, again):
    assert worth_retrying(None, None, Failed(data=error)) is again


def test_every_task_is_tried_again_but_the_gate():
    made = params({"retrain.retries": 3})
    assert (options(made, publish)["retries"], options(made, hold_gate)["retries"]) == (3, 0)


@pytest.mark.parametrize(
    ("cron", "timezone", "message"),
    [
        ("0 3 * *", None, r"--cron is '0 3 \* \*'; expected five fields"),
        ("61 3 * * *", None, r"--cron is '61 3 \* \* \*'; expected five fields"),
        ("0 3 * * *", "Mars/Olympus", "--timezone is 'Mars/Olympus'; expected an IANA name such as Europe/London"),
        ("0 3 * * *", "../../etc/passwd", "--timezone is .*; expected an IANA name"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused_before_anything_is_started(
    tmp_path, monkeypatch, cron, timezone, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("pipeline.scheduling.schedule.load_params", lambda: None)
    with pytest.raises(ParamsError, match=message):
        keep_schedule(cron, timezone, print, home=tmp_path / ".prefect")
    assert not (tmp_path / ".prefect").exists()


def test_the_comparison_is_shown_with_what_is_not_known_as_a_dash():
    measures = {
        "all": Measure(0.9, 0.95, 0.05, 0.01, 0.09, 0.02, "beyond_noise", 0.0, True),
        "latency_ms": Measure(None, None, None, None, None, None, "none", 0.0, None),
    }
    assert comparison(measures) == [
        {"measure": "all", "champion": "0.9000", "challenger": "0.9500", "difference": "+0.0500",
         "interval": "+0.0100 to +0.0900", "McNemar p": "0.02", "rule": "beyond_noise, margin 0", "verdict": "passed"},
        {"measure": "latency_ms", "champion": "–", "challenger": "–", "difference": "–", "interval": "–",
         "McNemar p": "–", "rule": "none", "verdict": "–"},
    ]  # fmt: skip


def test_a_decision_on_too_few_test_images_is_shown_as_such():
    measure = Measure(0.5, 0.5, 0.0, 0.0, 0.0, 1.0, "estimate", 0.0, None, 8, 8.0)
    (row,) = comparison({"few": measure})
    assert row["verdict"] == "too few images"
    assert comparison({"few": replace(measure, images=160, effective=160.0, passed=True)})[0]["verdict"] == "passed"


def test_a_release_that_was_not_decided_on_is_settled_until_the_gate_or_the_champion_changes():
    gate = GateParams()
    left = Decided("release", 3, gate_sha256(gate), "undecided", None)
    assert left.settles("release", 3, gate) and not left.settles("release", 4, gate)
    other = GateParams.model_validate({"few": {"rule": "none"}})
    assert not left.settles("release", 3, other)
