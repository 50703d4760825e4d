"""Retraining under continuous requests to a real server: no request fails, the champion stays served."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from pipeline.flows.records import Outcome
from serving.client.sync_client import Client
from serving.repository.promotion_log import LOG_NAME
from serving.repository.release import list_versions
from tests.end_to_end.retraining.conftest import GOOD, champion_of, leftovers
from tests.serving.conftest import picture
from tests.support.retraining import METRICS, Retraining
from tests.support.retraining_run import WITHIN, Asking, Begun

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("retrain"), pytest.mark.timeout(1800)]

TASKS = ["ingest", "split", "prior", "teacher", "student", "evaluate", "export", "gate", "publish", "verify", "promote"]


def test_the_first_version_is_served_with_its_evidence(project):
    folder = project.first
    assert json.loads((folder / "decision.json").read_text())["promote"] is True
    run_info = json.loads((folder / "retrain.json").read_text())
    assert run_info["because"] == "a test" and run_info["compared_with"] is None
    assert {"predictions.parquet", "prior.json", "report.html"} <= {path.name for path in folder.iterdir()}


def test_a_run_without_changes_ends_early(project, context):
    project.choose("first")
    served = champion_of(project)
    Begun(context, project.root).outcome()  # records a promotion that a killed run of an earlier test has made, if any
    assert champion_of(project) == served
    run = Begun(context, project.root)
    outcome = run.outcome()
    assert outcome.ending == "unchanged" and "no new data and no changed params" in outcome.message
    assert "gate: starts" not in run.text() and "split: starts" not in run.text()


def test_dvc_lists_promoted_and_refused_runs_with_metrics_and_the_project_is_unchanged(project, context):
    project.prepare("worse", 8, 0.25)
    project.choose("worse")
    before = [project.run("git", *command).stdout for command in (["status", "--porcelain"], ["stash", "list"])]
    run = Begun(context, project.root)
    assert run.outcome().ending == "refused"
    assert "saved as the DVC experiment retrain-" in run.text()
    assert before == [project.run("git", *command).stdout for command in (["status", "--porcelain"], ["stash", "list"])]
    (_, committed) = json.loads(project.run("dvc", "exp", "show", "--json").stdout)
    runs = [revision for experiment in committed["experiments"] for revision in experiment["revs"]]
    runs.sort(key=lambda run: run["name"])  # names begin with the time: take the last of several rejected ones
    listed = {run["name"].split("-", 3)[3]: run["data"]["metrics"][METRICS]["data"]["all"] for run in runs}
    assert listed["promoted-1"] == pytest.approx(0.6, abs=0.05) and listed["refused"] == pytest.approx(0.25, abs=0.05)


@pytest.mark.faults
@pytest.mark.fault_case("killed-between-tasks")
def test_the_run_after_kills_before_and_after_every_task_completes(project, context, server):
    before = champion_of(project)
    project.prepare("second", 2, GOOD)
    project.choose("second")
    moments = [f"{task}: {moment}" for task in TASKS for moment in ("starts", "done")]
    with Asking(server) as asking:
        for moment in moments:
            Begun(context, project.root).kill_at(moment)
        outcome = Begun(context, project.root).outcome()
    # The last kill follows "promote: done"; a run that has recorded its decision leaves no work to the next.
    assert outcome.ending in ("promoted", "unchanged") and outcome.version == before + 1
    assert asking.failures == [] and asking.versions[-1] == before + 1
    assert asking.versions == sorted(asking.versions)  # the version never decreases
    assert [(state.version, state.state) for state in list_versions(project.repository)][-2:] == [
        (before, "served"),
        (before + 1, "champion"),
    ]
    assert leftovers(project) == []
    assert Begun(context, project.root).outcome().ending == "unchanged"


@pytest.mark.faults
@pytest.mark.fault_case("killed-during-swap")
def test_runs_killed_during_a_swap_leave_a_version_that_answers(project, context, server):
    before = champion_of(project)
    project.prepare("third", 3, GOOD)
    project.choose("third")
    with Asking(server) as asking:
        for after in (0.1, 0.4, 0.8):
            run = Begun(context, project.root)
            run.await_line("promote: starts")
            time.sleep(after)
            run.process.kill()
            run.process.join()
        outcome = Begun(context, project.root).outcome()
    assert outcome.ending == "promoted" and outcome.version == before + 1
    assert asking.failures == [] and set(asking.versions) <= {before, before + 1}
    assert asking.versions[-1] == before + 1
    assert leftovers(project) == []


def invert_logits_after(model: Path, moment: Path) -> None:
    """Make a version return wrong results once a file exists, which is created after its promotion."""
    code = model.read_text()
    line = "        logits = self.balanced_logits(images)\n"
    assert line in code
    model.write_text(
        code.replace(line, f"{line}        logits = -logits if Path({str(moment)!r}).exists() else logits\n")
    )


def run_with_wrong_answers(project: Retraining, context, version: int, moment: Path) -> Outcome:
    """Return the outcome of a run whose version `version` returns wrong results after its promotion."""
    log = project.repository / LOG_NAME
    promotions = len(log.read_text().splitlines())
    run = Begun(context, project.root)
    run.await_line("publish: done")  # an existing release keeps its number
    invert_logits_after(project.repository / "classifier" / str(version) / "model.py", moment)
    deadline = time.monotonic() + WITHIN
    while len(log.read_text().splitlines()) == promotions:
        assert run.process.is_alive() and time.monotonic() < deadline, run.text()
        time.sleep(0.01)
    moment.touch()
    return run.outcome()


@pytest.mark.fault_case("wrong-answers")
def test_a_version_with_wrong_answers_is_rolled_back_and_not_promoted_again(project, context, server, tmp_path):
    before = champion_of(project)
    project.prepare("wrong-answers", 18, GOOD)
    project.choose("wrong-answers")
    project.set("retrain", watch_seconds=20.0)
    try:
        outcome = run_with_wrong_answers(project, context, before + 1, tmp_path / "now")
    finally:
        project.set("retrain", watch_seconds=0.0)
    assert outcome.ending == "failed"
    assert f"version {before + 1} was promoted and rolled back, {before} answers" in outcome.message
    with Client(server.grpc_url) as client:
        assert client.predict([picture(1)])[0].version == before
    assert champion_of(project) == before  # and the version is withdrawn
    assert Begun(context, project.root).outcome().ending == "unchanged"


@pytest.mark.fault_case("wrong-answers-of-older-version")
def test_a_rollback_from_an_older_version_keeps_that_version(project, context, server, tmp_path):
    project.prepare("newer", 10, GOOD)
    project.choose("newer")
    assert Begun(context, project.root).outcome().ending == "promoted"
    before = champion_of(project)
    project.prepare("again", 1, GOOD)
    shutil.rmtree(project.root / "prepared" / "again" / "export")
    shutil.copytree(project.root / "prepared" / "first" / "export", project.root / "prepared" / "again" / "export")
    project.choose("again")
    project.set("retrain", watch_seconds=20.0)
    try:
        outcome = run_with_wrong_answers(project, context, 1, tmp_path / "now")
    finally:
        project.set("retrain", watch_seconds=0.0)
    assert f"version 1 was promoted and rolled back, {before} answers" in outcome.message
    assert champion_of(project) == before
    assert 1 in {state.version for state in list_versions(project.repository)}
    with Client(server.grpc_url) as client:
        assert client.predict([picture(1)])[0].version == before
