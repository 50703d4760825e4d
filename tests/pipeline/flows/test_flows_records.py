"""Records of flow runs for later runs: the releases already decided on, and the last run."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta

import pytest

from pipeline.flows.records import (
    DecisionRecord,
    Outcome,
    RunRecord,
    gate_sha256,
    missed_run,
    now,
    prune,
    read_decision,
    read_run,
    write_decision,
    write_run,
)
from pipeline.params import GateParams

GATE = GateParams()
PROMOTED = Outcome("promoted", "version 2 answers", 2)


def run_of(begun, outcome=PROMOTED, ended=True):
    return RunRecord(begun.isoformat(), begun.isoformat() if ended else None, "why", 1, outcome if ended else None)


def test_a_refused_release_is_decided_again_only_with_another_champion_or_gate():
    refused = DecisionRecord("a", 4, gate_sha256(GATE), "refused", None)
    assert refused.already_decided("a", 4, GATE)
    assert not refused.already_decided("b", 4, GATE)
    assert not refused.already_decided("a", 3, GATE)
    assert not refused.already_decided("a", 4, GateParams(floor=0.5))


@pytest.mark.fault_case("rolled-back-by-operator")
def test_a_promoted_release_is_not_promoted_again_automatically_after_a_rollback():
    promoted = DecisionRecord("a", 4, gate_sha256(GATE), "promoted", 5)
    assert all(promoted.already_decided("a", champion, GATE) for champion in (3, 4, 5))


def test_records_are_read_as_written_and_a_damaged_record_is_none(tmp_path):
    decided = DecisionRecord("a", None, "b", "promoted", 1)
    write_decision(decided, tmp_path)
    assert read_decision(tmp_path) == decided
    run = run_of(now())
    write_run(run, tmp_path)
    assert read_run("last", tmp_path) == run
    for name in ("decided", "last"):
        (tmp_path / f"{name}.json").write_text('{"half')
    assert read_decision(tmp_path) is None and read_run("last", tmp_path) is None


def test_the_record_of_a_running_run_is_separate_from_the_last_one(tmp_path):
    write_run(run_of(now(), ended=False), tmp_path)
    assert read_run("last", tmp_path) is None and read_run("running", tmp_path).process == 1
    write_run(run_of(now()), tmp_path)
    assert read_run("running", tmp_path) is None


def test_one_run_replaces_all_missed_runs(tmp_path):
    scheduled = [now() - timedelta(days=days) for days in (3, 2, 1)]
    assert [missed_run(time, tmp_path) for time in scheduled] == [None, None, None]
    done = run_of(now())
    write_run(done, tmp_path)
    assert [missed_run(time, tmp_path) for time in scheduled] == [done, done, done]
    assert missed_run(now() + timedelta(seconds=2), tmp_path) is None


@pytest.mark.parametrize("ending", ["failed", "skipped", "busy"])
def test_a_failed_or_skipped_run_replaces_no_missed_run(tmp_path, ending):
    write_run(run_of(now(), Outcome(ending, "")), tmp_path)
    assert missed_run(now() - timedelta(days=1), tmp_path) is None


@pytest.mark.fault_case("clock-set-back")
def test_a_clock_that_was_set_back_prevents_no_scheduled_run(tmp_path):
    write_run(run_of(now() + timedelta(hours=5)), tmp_path)
    assert missed_run(now(), tmp_path) is None
    assert missed_run(now() + timedelta(hours=1), tmp_path) is None
    # The order is correct again after a run has ended under the new time.
    write_run(replace(run_of(now())), tmp_path)
    assert missed_run(now() - timedelta(hours=1), tmp_path) is not None


def test_prune_deletes_the_oldest_evidence_and_never_the_current(tmp_path):
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        os.utime(tmp_path / str(number), (1e9 + number, 1e9 + number))
    current = tmp_path / "0"  # written after the clock was set back: the oldest by its time
    prune(current, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "4", "5"]
    prune(current, keep=3)
    assert len(list(tmp_path.iterdir())) == 3
