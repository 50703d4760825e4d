"""Retraining with invalid releases, an evidence folder that cannot be written, bad drops, and two runs at once."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import yaml

from pipeline.params import load_params
from serving.repository.manifest import sha256_of
from tests.end_to_end.retraining.conftest import GOOD, champion_of
from tests.serving.conftest import CLASSES, picture
from tests.support.retraining import Retraining
from tests.support.retraining_run import WITHIN, Asking, Begun
from tests.support.shown import check_refusal, last_run

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("retrain"), pytest.mark.timeout(1800)]


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


def no_damage(_project: Retraining) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "seed", "accuracy", "ending", "message"),
    [
        (corrupt_graph, 21, 0.95, "failed", "ONNX Runtime cannot run it"),
        (wrong_hash, 22, 0.95, "failed", "the manifest has"),
        (other_classes, 23, 0.95, "refused", "cannot be computed: challenger and champion have different classes"),
        (no_report, 24, 0.95, "refused", "cannot be computed: artifacts/evaluation/report.html: no such file"),
        (no_damage, 25, [1.0, 1.0, 1.0, 1.0, 0.5], "refused", "few "),
    ],
    ids=["corrupt graph", "wrong hash", "other classes", "no report", "worse on few only"],
)
@pytest.mark.fault_case("corrupt-release", "wrong-hash", "other-classes", "missing-evaluation-file", "worse-on-few")
def test_an_invalid_challenger_is_never_served(
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


def run_gate_in(root: str, log: str) -> None:
    """A flow with only the gate."""
    os.chdir(root)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    from prefect import flow

    from pipeline.flows.tasks import TaskRunner, run_gate

    params = load_params()

    @flow(name="gate alone")
    def gate_alone() -> None:
        TaskRunner(params)(run_gate, params, None, {"release": "0" * 64})

    gate_alone(return_state=True)


@pytest.mark.fault_case("decision-not-written")
def test_a_gate_whose_decision_cannot_be_written_fails_without_a_retry(project, context, prefect, tmp_path):
    params = yaml.safe_load((project.root / "params.yaml").read_text())
    params["retrain"]["retries"] = 2
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "retrain").write_text("no folder")
    run = context.Process(target=run_gate_in, args=(str(tmp_path), str(tmp_path / "log")))
    run.start()
    run.join(WITHIN)
    log = (tmp_path / "log").read_text()
    assert last_run(prefect.api_url).state == "Failed" and "File exists: 'artifacts/retrain'" in log
    assert "Retry" not in log, log


@pytest.mark.faults
@pytest.mark.fault_case("drop-being-written", "few-bad-rows", "many-bad-rows")
def test_a_drop_waits_while_it_is_written_and_is_refused_above_the_share_of_bad_rows(project, context, server):
    project.choose("first")
    Begun(context, project.root).outcome()  # decides on it, whichever test ran before
    drop = project.root / "data" / "drop"

    def fill(bad: int, seeds: range) -> None:
        for number, seed in enumerate(seeds):
            path = drop / CLASSES[0] / f"{seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no image" if number < bad else picture(seed))

    def retrain(settle_seconds: float) -> tuple[str, str]:
        project.set("ingest", settle_seconds=settle_seconds)
        run = Begun(context, project.root)
        outcome = run.outcome()
        assert outcome.ending == "unchanged"
        return outcome.message, run.text()

    with Asking(server) as asking:
        fill(3, range(1000, 1010))
        assert "ingest: no new data; 10 files may still be being written and will be read later" in retrain(600)[1]
        _, text = retrain(0)
        assert "ingest: 7 images added" in text and "3 bad rows (format 3)" in text
        fill(4, range(2000, 2010))
        message, _ = retrain(0)
    assert "the drop was refused: 4 of 10 rows are bad" in message
    assert len(list((drop / CLASSES[0]).glob("*.png"))) == 10  # no file was ingested
    shutil.rmtree(drop)
    assert asking.failures == [] and len(set(asking.versions)) == 1


@pytest.mark.faults
@pytest.mark.fault_case("two-runs")
def test_of_two_simultaneous_runs_one_is_refused(project, context):
    project.prepare("fourth", 4, GOOD)
    project.choose("fourth")
    runs = [Begun(context, project.root, name) for name in ("one", "other")]
    outcomes = {outcome.ending: outcome for outcome in (run.outcome() for run in runs)}
    assert set(outcomes) == {"promoted", "busy"}
    assert "another retraining is in progress" in outcomes["busy"].message
    assert "set retrain.when_busy: wait" in outcomes["busy"].message
