"""Faults during a retraining, under continuous requests to a real server: no request fails, the champion stays served.

Each run is `tailor retrain --json` in a process forked from one that has imported Prefect already.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.flows.records import Outcome
from pipeline.params import load_params
from pipeline.scheduling.prefect_server import PrefectServer
from serving.client.sync_client import Client
from serving.repository.manifest import sha256_of
from serving.repository.promotion_log import LOG_NAME
from serving.repository.release import list_versions
from serving.server.supervisor import Supervisor
from serving.server.triton_server import TritonServer
from tests.serving.conftest import CLASSES, picture
from tests.support.retraining import METRICS, Retraining
from tests.support.retraining_run import WITHIN, Asking, Begun, commands_below, end_of_all
from tests.support.shown import check_refusal, last_run

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("retrain"), pytest.mark.timeout(1800)]

GOOD = 0.9  # accuracy of each challenger that should be promoted
TASKS = ["ingest", "split", "prior", "teacher", "student", "evaluate", "export", "gate", "publish", "verify", "promote"]


@pytest.fixture(scope="module")
def prefect(tmp_path_factory):
    with PrefectServer(tmp_path_factory.mktemp("prefect"), scheduling=False) as server:
        yield server


@pytest.fixture(scope="module")
def context(prefect, tmp_path_factory):
    """The multiprocessing context from which runs are forked."""
    settings = {
        "PREFECT_API_URL": prefect.api_url,
        "PREFECT_HOME": str(tmp_path_factory.mktemp("home")),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "PREFECT_CLIENT_MAX_RETRIES": "2",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        made = multiprocessing.get_context("forkserver")
        made.set_forkserver_preload(
            [
                "pipeline.flows.retraining",
                "pipeline.scheduling.trigger",
                "pipeline.commands",
                "tests.support.retraining_run",
            ]
        )
        yield made


@pytest.fixture(scope="module")
def project(prefect, context, tmp_path_factory):
    """A project with its first version promoted."""
    made = Retraining(tmp_path_factory.mktemp("retrain") / "project", prefect.api_url)
    made.prepare("first", 1, 0.6)
    made.choose("first")
    assert Begun(context, made.root).outcome().version == 1
    # A test promotes version 1 again, which changes its folder.
    made.first = shutil.copytree(made.repository / "classifier" / "1", tmp_path_factory.mktemp("first") / "1")
    return made


@pytest.fixture(scope="module")
def server(project):
    started = TritonServer(project.repository, http_port=0, grpc_port=0, metrics_port=0).start()
    yield started
    started.stop(at_once=True)


def champion_of(project: Retraining) -> int:
    """Return the served version, which is the newest one; independent of the tests that ran before."""
    newest = list_versions(project.repository)[-1]
    assert newest.state == "champion"
    return newest.version


def leftovers(project: Retraining) -> list[str]:
    """Return temporary (hidden) files in the repository, which a finished run must not leave."""
    hidden = [path for model in ("student", "classifier") for path in (project.repository / model).glob(".*")]
    return [str(path) for path in hidden]


def test_the_first_version_is_served_with_its_decision_beside_it(project):
    folder = project.first
    assert json.loads((folder / "decision.json").read_text())["promote"] is True
    story = json.loads((folder / "retrain.json").read_text())
    assert story["because"] == "a test" and story["compared_with"] is None
    assert {"predictions.parquet", "prior.json", "report.html"} <= {path.name for path in folder.iterdir()}


def test_a_run_with_nothing_new_ends_early_and_says_so(project, context):
    project.choose("first")
    assert Begun(context, project.root).outcome().ending in ("unchanged", "refused")
    run = Begun(context, project.root)
    outcome = run.outcome()
    assert outcome.ending == "unchanged" and "no new data and no changed params" in outcome.message
    assert "gate: starts" not in run.text() and "split: starts" not in run.text()


def test_dvc_exp_show_lists_the_promoted_and_the_refused_run_with_their_metrics_and_the_project_stays(project, context):
    project.prepare("worse", 8, 0.25)
    project.choose("worse")
    before = [project.run("git", *asked).stdout for asked in (["status", "--porcelain"], ["stash", "list"])]
    run = Begun(context, project.root)
    assert run.outcome().ending == "refused"
    assert "kept as the DVC experiment retrain-" in run.text()
    assert before == [project.run("git", *asked).stdout for asked in (["status", "--porcelain"], ["stash", "list"])]
    (_, committed) = json.loads(project.run("dvc", "exp", "show", "--json").stdout)
    runs = [revision for experiment in committed["experiments"] for revision in experiment["revs"]]
    runs.sort(key=lambda run: run["name"])  # names begin with the time: take the last of several rejected ones
    listed = {run["name"].split("-", 3)[3]: run["data"]["metrics"][METRICS]["data"]["all"] for run in runs}
    assert listed["promoted-1"] == pytest.approx(0.6, abs=0.05) and listed["refused"] == pytest.approx(0.25, abs=0.05)


@pytest.mark.faults
@pytest.mark.fault_case("killed-between-tasks")
def test_runs_killed_before_and_after_every_task_lose_nothing_and_the_next_one_finishes(project, context, server):
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
def test_runs_killed_in_the_midst_of_a_swap_leave_a_version_that_answers(project, context, server):
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


def spoil_at(model: Path, moment: Path) -> None:
    """Make a version return wrong results once a file exists, which is created after its promotion."""
    code = model.read_text()
    line = "        logits = self.balanced_logits(images)\n"
    assert line in code
    model.write_text(
        code.replace(line, f"{line}        logits = -logits if Path({str(moment)!r}).exists() else logits\n")
    )


def taken_back(project: Retraining, context, version: int, moment: Path) -> Outcome:
    """Return the outcome of a run whose version `version` returns wrong results after its promotion."""
    log = project.repository / LOG_NAME
    known = len(log.read_text().splitlines())
    run = Begun(context, project.root)
    run.await_line("publish: done")  # an existing release keeps its number
    spoil_at(project.repository / "classifier" / str(version) / "model.py", moment)
    deadline = time.monotonic() + WITHIN
    while len(log.read_text().splitlines()) == known:
        assert run.process.is_alive() and time.monotonic() < deadline, run.text()
        time.sleep(0.01)
    moment.touch()
    return run.outcome()


@pytest.mark.fault_case("wrong-answers")
def test_a_version_that_answers_wrongly_once_it_is_promoted_is_taken_back_and_not_tried_again(
    project, context, server, tmp_path
):
    before = champion_of(project)
    project.prepare("turncoat", 18, GOOD)
    project.choose("turncoat")
    project.set("retrain", watch_seconds=20.0)
    try:
        outcome = taken_back(project, context, before + 1, tmp_path / "now")
    finally:
        project.set("retrain", watch_seconds=0.0)
    assert outcome.ending == "failed"
    assert f"version {before + 1} was promoted and rolled back, {before} answers" in outcome.message
    with Client(server.grpc_url) as client:
        assert client.predict([picture(1)])[0].version == before
    assert champion_of(project) == before  # and the version is withdrawn
    assert Begun(context, project.root).outcome().ending == "unchanged"


@pytest.mark.fault_case("wrong-answers-of-older-version")
def test_an_older_version_that_is_best_again_and_answers_wrongly_is_left_for_the_newer_one_and_kept(
    project, context, server, tmp_path
):
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
        outcome = taken_back(project, context, 1, tmp_path / "now")
    finally:
        project.set("retrain", watch_seconds=0.0)
    assert f"version 1 was promoted and rolled back, {before} answers" in outcome.message
    assert champion_of(project) == before
    assert 1 in {state.version for state in list_versions(project.repository)}
    with Client(server.grpc_url) as client:
        assert client.predict([picture(1)])[0].version == before


def corrupt_graph(project: Retraining) -> None:
    """Truncate a graph, with a matching hash in its manifest."""
    export = project.root / "prepared" / "bad" / "export"
    graph = export / "student.onnx"
    graph.write_bytes(graph.read_bytes()[:-40])
    files = json.loads((export / "manifest.json").read_text())["files"]
    project.edit_manifest("bad", files=files | {"student.onnx": sha256_of(graph)})


def wrong_hash(project: Retraining) -> None:
    graph = project.root / "prepared" / "bad" / "export" / "student.onnx"
    graph.write_bytes(graph.read_bytes() + b"\n")


def other_classes(project: Retraining) -> None:
    renamed = ["wasp", *CLASSES[1:]]
    project.edit_manifest("bad", classes=renamed)
    prior = project.root / "prepared" / "bad" / "prior"
    prior.write_text(json.dumps(json.loads(prior.read_text()) | {"classes": renamed}))


def no_report(project: Retraining) -> None:
    (project.root / "prepared" / "bad" / "evaluate" / "report.html").unlink()


def nothing_else(_project: Retraining) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "seed", "accuracy", "ending", "message"),
    [
        (corrupt_graph, 21, 0.95, "failed", "ONNX Runtime cannot run it"),
        (wrong_hash, 22, 0.95, "failed", "the manifest has"),
        (other_classes, 23, 0.95, "refused", "cannot be computed: challenger and champion have different classes"),
        (no_report, 24, 0.95, "refused", "cannot be computed: artifacts/evaluation/report.html: no such file"),
        (nothing_else, 25, [1.0, 1.0, 1.0, 1.0, 0.5], "refused", "few "),
    ],
    ids=["corrupt graph", "wrong hash", "other classes", "no report", "worse on few only"],
)
@pytest.mark.fault_case("corrupt-release", "wrong-hash", "other-classes", "missing-evaluation-file", "worse-on-few")
def test_a_challenger_that_is_not_fit_never_reaches_the_server(
    project, context, server, prefect, damage, seed, accuracy, ending, message
):
    before = champion_of(project)
    project.prepare("bad", seed, accuracy)  # a release is decided on only once
    damage(project)
    # The stages depend on one changed file, the challenger's name.
    (project.root / "prepared" / "bad").rename(project.root / "prepared" / damage.__name__)
    project.choose(damage.__name__)
    with Asking(server) as asking:
        outcome = Begun(context, project.root).outcome()
    assert outcome.ending == ending and message in outcome.message
    assert asking.failures == [] and set(asking.versions) == {before}
    assert champion_of(project) == before
    if ending == "refused":
        check_refusal(last_run(prefect.api_url), project.root / outcome.evidence)
    if damage is no_report:  # missing evidence may exist at the next run, which therefore decides again
        assert Begun(context, project.root).outcome().ending == "refused"


def hold_gate_in(root: str, log: str) -> None:
    """A flow with only the gate."""
    os.chdir(root)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    from prefect import flow

    from pipeline.flows.tasks import Steps, hold_gate

    made = load_params()

    @flow(name="gate alone")
    def gate_alone() -> None:
        Steps(made)(hold_gate, made, None, {"release": "0" * 64})

    gate_alone(return_state=True)


@pytest.mark.fault_case("decision-not-written")
def test_a_gate_whose_decision_cannot_be_written_fails_and_is_not_tried_again(project, context, prefect, tmp_path):
    made = yaml.safe_load((project.root / "params.yaml").read_text())
    made["retrain"]["retries"] = 2
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(made))
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "retrain").write_text("no folder")
    run = context.Process(target=hold_gate_in, args=(str(tmp_path), str(tmp_path / "log")))
    run.start()
    run.join(WITHIN)
    log = (tmp_path / "log").read_text()
    assert last_run(prefect.api_url).state == "Failed" and "File exists: 'artifacts/retrain'" in log
    assert "Retry" not in log, log


@pytest.mark.faults
@pytest.mark.fault_case("drop-being-written", "few-bad-rows", "many-bad-rows")
def test_a_drop_that_is_still_being_written_waits_with_three_bad_rows_of_ten_it_is_taken_and_with_four_refused(
    project, context, server
):
    drop = project.root / "data" / "drop"

    def fill(bad: int, seeds: range) -> None:
        for number, seed in enumerate(seeds):
            path = drop / CLASSES[0] / f"{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no image" if number < bad else picture(seed))

    def told(settle_seconds: float) -> tuple[str, str]:
        project.set("ingest", settle_seconds=settle_seconds)
        run = Begun(context, project.root)
        outcome = run.outcome()
        assert outcome.ending == "unchanged"
        return outcome.message, run.text()

    with Asking(server) as asking:
        fill(3, range(1000, 1010))
        assert "ingest: no new data; 10 files may still be being written and will be read later" in told(600)[1]
        _, text = told(0)
        assert "ingest: 7 images added" in text and "3 bad rows (format 3)" in text
        fill(4, range(2000, 2010))
        message, _ = told(0)
    assert "the drop was refused: 4 of 10 rows are bad" in message
    assert len(list((drop / CLASSES[0]).glob("*.png"))) == 10  # no file was ingested
    assert asking.failures == [] and len(set(asking.versions)) == 1


@pytest.mark.faults
@pytest.mark.fault_case("two-runs")
def test_of_two_runs_at_once_one_does_the_work_and_the_other_is_refused(project, context):
    project.prepare("fourth", 4, 0.9)
    project.choose("fourth")
    runs = [Begun(context, project.root, name) for name in ("one", "other")]
    outcomes = {outcome.ending: outcome for outcome in (run.outcome() for run in runs)}
    assert set(outcomes) == {"promoted", "busy"}
    assert "another retraining is under way" in outcomes["busy"].message
    assert "set retrain.when_busy: wait" in outcomes["busy"].message


@pytest.mark.faults
@pytest.mark.parametrize(("model", "seed", "accuracy"), [("student", 5, 0.93), ("classifier", 6, 0.96)])
@pytest.mark.fault_case("triton-killed-during-load")
def test_triton_killed_while_a_version_loads_is_started_again_and_gets_it(
    project, context, server, model, seed, accuracy
):
    before = champion_of(project)
    project.prepare(f"with-{model}", seed, accuracy)
    project.choose(f"with-{model}")
    project.set("retrain", retries=6, retry_seconds=1.0)
    reports: list[str] = []
    over = threading.Event()
    keeping = threading.Thread(target=Supervisor(server, reports.append).run, args=(over,))
    keeping.start()
    try:
        with Asking(server) as asking:
            run = Begun(context, project.root)
            run.await_line("promote: starts")
            while (model, before + 1) not in server.process_counts():  # it exists from the start of the load
                assert run.process.is_alive(), run.text()
            os.kill(server.process_id, signal.SIGKILL)
            outcome = run.outcome()
            with Client(server.grpc_url) as client:
                assert client.predict([picture(1)])[0].version == before + 1
    finally:
        over.set()
        keeping.join()
        project.set("retrain", retries=0)
    assert outcome.ending == "promoted" and outcome.version == before + 1
    assert f"at {server.grpc_url}" in outcome.message  # and not "once a server starts"
    assert any("ended by itself" in report for report in reports)
    assert set(asking.versions) <= {before, before + 1}


@pytest.mark.faults
@pytest.mark.fault_case("prefect-stops")
def test_prefects_server_stopped_in_the_midst_of_a_run_keeps_no_better_model_from_going_live(
    project, context, server, prefect
):
    project.prepare("last", 7, 0.99)
    project.choose("last")
    run = Begun(context, project.root)
    run.await_line("export: starts")
    prefect.stop()
    outcome = run.outcome()
    assert outcome.ending == "promoted"
    assert "Prefect's server is not told any more" in run.text()
    with Client(server.grpc_url) as client:
        assert client.predict([picture(1)])[0].version == outcome.version


@pytest.mark.faults
@pytest.mark.fault_case("killed-between-tasks")
def test_a_run_with_the_settings_as_shipped_takes_its_trial_server_and_its_prefect_server_along(tmp_path):
    project = Retraining(tmp_path / "project", rehearsal=True, watch_seconds=1.0, load_seconds=60)
    with (tmp_path / "log").open("w") as log:
        project.prepare("first", 1, 0.6)
        project.choose("first")
        assert project.start_into(log, "retrain").wait(WITHIN) == 0
        project.prepare("second", 2, 0.9)
        project.choose("second")
        run = project.start_into(log, "retrain")
        deadline = time.monotonic() + WITHIN
        while not any("tritonserver" in command for command in commands_below(run.pid)):
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        begun = psutil.Process(run.pid).children(recursive=True)
        assert any("prefect" in command for command in commands_below(run.pid))
        run.kill()
        run.wait()
        end_of_all(begun)
        assert [state.state for state in list_versions(project.repository)] == ["champion", "kept"]
        project.start_into(log, "retrain").wait(WITHIN)
    assert champion_of(project) == 2 and leftovers(project) == []
    story = json.loads((project.root / "artifacts" / "retrain" / "last.json").read_text())
    assert story["outcome"]["ending"] == "promoted" and "on a server of its own" in story["outcome"]["message"]
