"""Stage `seeds`: full runs with further seeds, resumed after interruptions; their mean and spread."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline import embed, evaluate, prior, seeds, split, student, teacher
from pipeline.params import Params
from pipeline.shared.errors import ParamsError
from tests.support.making import ROOT, data_params, folder
from tests.support.small_encoder import tiny_encoder, tiny_params

pytestmark = pytest.mark.end_to_end

TINY = {
    "image.size": 8, "image.resize_to": 8, "teacher.epochs": 1, "teacher.batch_size": 4, "student.epochs": 1,
    "student.batch_size": 4, "student.queue_total": 8, "student.queue_minimum": 2, "student.projection_dim": 4,
}  # fmt: skip


def with_changes(params: Params, changes: dict) -> Params:
    content = params.model_dump(mode="json")
    for key, value in changes.items():
        *sections, last = key.split(".")
        mapping = content
        for section in sections:
            mapping = mapping[section]
        mapping[last] = value
    return Params.model_validate(content)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny project with all stages up to the evaluation finished; its folder and params."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        made = data_params(folder(root / "images", {"cat": 12, "dog": 9, "eel": 7}))
        made = with_changes(made, TINY)
        for stage in (split, prior, teacher, student, evaluate):
            stage.run(made)
    return root, made


def test_one_seed_has_a_summary_without_a_spread(project, monkeypatch):
    root, made = project
    monkeypatch.chdir(root)
    result = seeds.run(made)
    summary = json.loads((root / "artifacts/seeds/summary.json").read_text())
    assert summary["seeds"] == [0]
    assert summary["student"]["balanced"]["all"]["std"] is None
    assert str(result).startswith("one seed, balanced accuracy ")


def test_further_seeds_train_side_by_side_and_their_spread_is_that_of_their_metrics(project, monkeypatch):
    root, made = project
    monkeypatch.chdir(root)
    several = with_changes(made, {"seeds": [1, 2], "engine.side_by_side": 2})
    result = seeds.run(several)
    summary = json.loads((root / "artifacts/seeds/summary.json").read_text())
    rows = list(csv.DictReader((root / "artifacts/seeds/seeds.csv").open()))
    assert {row["seed"] for row in rows} == {"0", "1", "2"}
    assert {row["network"] for row in rows} == {"teacher", "student", "student_best_epoch"}
    for network in ("teacher", "student", "student_best_epoch"):
        values = [float(row["nll"]) for row in rows if row["network"] == network and row["target_prior"] == "balanced"]
        actual = summary[network]["balanced"]["nll"]
        assert actual["mean"] == pytest.approx(statistics.mean(values))
        assert actual["std"] == pytest.approx(statistics.stdev(values)) and actual["std"] > 0
    assert " ± " in str(result)
    assert not (root / "artifacts/.seeds.unfinished").exists()


def test_an_interrupted_stage_keeps_the_seeds_that_had_finished(project, monkeypatch):
    root, made = project
    monkeypatch.chdir(root)
    several = with_changes(made, {"seeds": [3, 4]})
    trained, train = [], teacher.run

    def counted(params, output):
        if params.seed == 4 and not trained.count(4):
            trained.append(4)
            raise KeyboardInterrupt
        trained.append(params.seed)
        return train(params, output)

    monkeypatch.setattr(teacher, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        seeds.run(several)
    seeds.run(several)
    assert trained == [3, 4, 4]


def test_a_seed_that_had_finished_under_another_prior_is_trained_again(project, monkeypatch):
    root, made = project
    monkeypatch.chdir(root)
    several = with_changes(made, {"seeds": [5, 6]})
    trained, train = [], teacher.run

    def counted(params, output):
        trained.append(params.seed)
        if trained == [5, 6]:
            raise KeyboardInterrupt
        return train(params, output)

    monkeypatch.setattr(teacher, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        seeds.run(several)
    path = root / "artifacts/prior.json"
    before = path.read_text()
    kept = json.loads(before)
    path.write_text(json.dumps(kept | {"loss_log_prior": [-1.0 for _ in kept["classes"]]}))
    try:
        seeds.run(several)
    finally:
        path.write_text(before)
    assert trained == [5, 6, 5, 6]


def test_a_setting_of_the_report_alone_trains_no_seed_again():
    stage = yaml.safe_load((Path(seeds.__file__).parents[1] / "dvc.yaml").read_text())["stages"]["seeds"]
    keys = {
        name if inside is True else f"{name}.{key}"
        for name, inside in seeds.DEPENDS.items()
        for key in ([""] if inside is True else inside)
    }
    # The fingerprint contains the split's files; the list of seeds selects runs and does not affect them.
    assert keys == set(stage["params"]) - {"data", "seeds"}
    assert not {"evaluate", "evaluate.champion", "evaluate.samples"} & keys


def test_a_repeated_seed_is_rejected(project):
    _, made = project
    with pytest.raises(ParamsError, match=r"seeds is \[1, 1\]; expected each seed once"):
        seeds.run(with_changes(made, {"seeds": [1, 1]}), Path("unused"))
    with pytest.raises(ParamsError, match=r"not seed \(0\), which runs anyway"):
        seeds.run(with_changes(made, {"seeds": [0]}), Path("unused"))


@pytest.mark.parametrize(
    ("changes", "networks"),
    [
        (
            {"student.memory": {"classifier": "both"}},
            {"teacher", "student", "student_best_epoch", "student_cosine_alone", "student_memory_alone"},
        ),
        ({"student.memory": {"classifier": "memory"}}, {"teacher", "student"}),
        ({"student.tune": "lora", "student.augment.flip": True}, {"teacher", "student", "student_best_epoch"}),
    ],
    ids=["both", "memory", "lora"],
)
def test_a_further_seed_of_a_student_with_a_memory_or_a_tuned_encoder_has_the_metrics_of_the_first(
    tmp_path, monkeypatch, changes, networks
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(student, "check_tuned_export", lambda *_: None)
    given = {"teacher.epochs": 1, "student.epochs": 1, "student.queue_total": 64, "seeds": [1], **changes}
    weights = tiny_encoder(tmp_path, monkeypatch)
    made = tiny_params(weights, folder(tmp_path / "images", {"a": 20, "b": 9}), given)
    for stage in (split, prior, embed, teacher, student, evaluate):
        stage.run(made)
    result = seeds.run(made)
    assert set(result.scores) == {0, 1}
    rows = list(csv.DictReader((tmp_path / "artifacts/seeds/seeds.csv").open()))
    for seed in ("0", "1"):
        assert {row["network"] for row in rows if row["seed"] == seed} >= networks - {"student_best_epoch"}
    assert {row["network"] for row in rows if row["seed"] == "1"} == networks
    losses = {
        name: {row["nll"] for row in rows if row["network"] == name and row["target_prior"] == "balanced"}
        for name in ("teacher", "student")
    }
    assert len(losses["teacher"]) == 2
    # A memory alone depends on the features, not on a seed.
    assert len(losses["student"]) == (1 if networks == {"teacher", "student"} else 2)


WORKER = """
import os, sys, time
from pathlib import Path
from pipeline.seeds import worker_pool

def forever(path):
    Path(path).with_suffix(".part").write_text(str(os.getpid()))
    Path(path).with_suffix(".part").rename(path)
    time.sleep(600)

if __name__ == "__main__":
    with worker_pool(1) as pool:
        pool.submit(forever, sys.argv[1]).result()
"""


def test_the_processes_of_seeds_end_with_a_stage_that_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(WORKER)
    stage = subprocess.Popen(
        [sys.executable, "program.py", "worker"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        wait_for((tmp_path / "worker").exists)
        worker = psutil.Process(int((tmp_path / "worker").read_text()))
    finally:
        stage.kill()
        stage.wait()
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def wait_for(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
