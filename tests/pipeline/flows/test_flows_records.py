"""Records of flow runs for later runs: the releases already decided on, and the last run."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta

import pytest

from pipeline.flows.records import (
    Decided,
    Outcome,
    Run,
    gate_sha256,
    missed,
    now,
    prune,
    read_decided,
    read_run,
    write_decided,
    write_run,
)
from pipeline.params import GateParams

GATE = GateParams()
PROMOTED = Outcome("promoted", "version 2 answers", 2)


def run_of(begun, outcome=PROMOTED, ended=True):
    return Run(begun.isoformat(), begun.isoformat() if ended else None, "why", 1, outcome if ended else None)


def test_a_refused_release_is_decided_on_again_only_against_another_champion_or_under_another_gate():
    refused = Decided("a", 4, gate_sha256(GATE), "refused", None)
    assert refused.settles("a", 4, GATE)
    assert not refused.settles("b", 4, GATE)
    assert not refused.settles("a", 3, GATE)
    assert not refused.settles("a", 4, GateParams(floor=0.5))


@pytest.mark.fault_case("rolled-back-by-operator")
def test_what_was_promoted_once_is_not_promoted_again_by_itself_after_a_rollback():
    promoted = Decided("a", 4, gate_sha256(GATE), "promoted", 5)
    assert promoted.settles("a", 5, GATE) and promoted.settles("a", 4, GATE) and promoted.settles("a", 3, GATE)


def test_records_come_back_as_they_were_written_and_a_damaged_one_counts_as_none(tmp_path):
    decided = Decided("a", None, "b", "promoted", 1)
    write_decided(decided, tmp_path)
    assert read_decided(tmp_path) == decided
    run = run_of(now())
    write_run(run, tmp_path)
    assert read_run("last", tmp_path) == run
    for name in ("decided", "last"):
        (tmp_path / f"{name}.json").write_text('{"half')
    assert read_decided(tmp_path) is None and read_run("last", tmp_path) is None


def test_a_run_under_way_is_told_apart_from_the_last_one(tmp_path):
    write_run(run_of(now(), ended=False), tmp_path)
    assert read_run("last", tmp_path) is None and read_run("running", tmp_path).process == 1
    write_run(run_of(now()), tmp_path)
    assert read_run("running", tmp_path) is None


def test_of_several_missed_runs_the_first_does_the_work_of_all(tmp_path):
    scheduled = [now() - timedelta(days=days) for days in (3, 2, 1)]
    assert [missed(time, tmp_path) for time in scheduled] == [None, None, None]
    done = run_of(now())
    write_run(done, tmp_path)
    assert [missed(time, tmp_path) for time in scheduled] == [done, done, done]
    assert missed(now() + timedelta(seconds=2), tmp_path) is None


@pytest.mark.parametrize("ending", ["failed", "skipped", "busy"])
def test_a_run_that_did_no_work_catches_nothing_up(tmp_path, ending):
    write_run(run_of(now(), Outcome(ending, "")), tmp_path)
    assert missed(now() - timedelta(days=1), tmp_path) is None


@pytest.mark.fault_case("clock-set-back")
def test_a_clock_that_was_set_back_keeps_no_scheduled_run_from_taking_place(tmp_path):
    write_run(run_of(now() + timedelta(hours=5)), tmp_path)
    assert missed(now(), tmp_path) is None
    assert missed(now() + timedelta(hours=1), tmp_path) is None
    # The order is correct again after a run has ended under the new time.
    write_run(replace(run_of(now())), tmp_path)
    assert missed(now() - timedelta(hours=1), tmp_path) is not None


def test_old_evidence_goes_and_the_current_one_stays_whatever_the_clock_said(tmp_path):
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        os.utime(tmp_path / str(number), (1e9 + number, 1e9 + number))
    current = tmp_path / "0"  # written after the clock was set back: the oldest by its time
    prune(current, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "4", "5"]
    prune(current, keep=3)
    assert len(list(tmp_path.iterdir())) == 3
