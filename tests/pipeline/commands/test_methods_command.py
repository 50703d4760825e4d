"""`tailor methods` and `tailor methods compare`: list, results, resuming, budget, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from pipeline import classifier, embed, prior, split, student
from pipeline.commands.app import main
from pipeline.data.class_prior import load_prior
from pipeline.evaluation.metrics import per_class_accuracy
from pipeline.evaluation.network_metrics import network_logits
from pipeline.features.stored import load_features
from pipeline.methods import page as page_of_methods
from pipeline.methods.catalogue import METHODS
from pipeline.model_io.devices import choose_device
from pipeline.shared.errors import StageError
from tests.support.browser import Reader
from tests.support.chromium import needs_chromium, started
from tests.support.label_maps import label_map_folder, segmentation_params
from tests.support.making import folder
from tests.support.small_encoder import tiny_encoder, tiny_params

SIZES = {"a": 40, "b": 24, "c": 15}
CHANGES = {"student.queue_total": 64, "data.validation_per_class": 8, "teacher.epochs": 1, "student.epochs": 2}
COMPARE = ("methods", "compare", "--methods")


@pytest.fixture(name="split_project", scope="module")
def _split_project(tmp_path_factory: pytest.TempPathFactory):
    """A folder with params.yaml, split, prior and features."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        made = tiny_params(tiny_encoder(root, patch), folder(root / "images", SIZES), CHANGES)
        for stage in (split, prior, embed):
            stage.run(made)
        (root / "params.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")), encoding="utf-8")
    return root, made


@pytest.fixture(name="project")
def _project(split_project, tmp_path, monkeypatch):
    root, made = split_project
    for name in ("data", "artifacts"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copy(root / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    tiny_encoder(tmp_path, monkeypatch)
    return made


def files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def result() -> dict:
    return json.loads(Path("comparison/comparison.json").read_text(encoding="utf-8"))


def test_the_list_has_every_method_with_paper_cost_and_licence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for method in METHODS:
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [method.name])
        assert method.step in line and method.licence in line
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in listed] == [method.name for method in METHODS]
    assert listed[0]["recipe"] == "recipes/methods/cross_entropy.yaml"


@pytest.mark.slow
def test_methods_are_trained_once_judged_on_the_test_split_and_reported(project, capsys, monkeypatch) -> None:
    before = files(Path("artifacts"))
    assert main([*COMPARE, "cross_entropy,post_hoc,gml,crt,gml_encoder", "--seeds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "10/10  seed 1  gml_encoder: all " in printed and "comparison/comparison.html" in printed
    assert files(Path("artifacts")) == before
    content = result()
    assert content["complete"] and content["reference"] == "cross_entropy" and content["seeds"] == [0, 1]
    rows = {row["method"]: row for row in content["methods"]}
    assert list(rows) == ["cross_entropy", "post_hoc", "gml", "crt", "gml_encoder"]
    for row in rows.values():
        assert np.mean(row["by_seed"]["all"]) == pytest.approx(row["accuracy"]["all"]["value"])
    # The student of cross_entropy again, with the stage itself.
    overlay = {"student": {**project.student.model_dump(), "beta": 0.0, "alpha": 0.0, "adjustment": 0.0}}
    plain = project.model_validate({**project.model_dump(), **overlay})
    student.run(plain, Path("again"))
    test, classes = load_features(plain, "test"), load_prior()
    logits = network_logits(Path("again"), "student", test, plain.image, classes, choose_device("cpu"))
    labels = test.labels.numpy()
    stored = [
        np.mean(per_class_accuracy((logits + strength * np.array(classes.log_prior)).argmax(1), labels, 3))
        for strength in (1, 0)
    ]
    for cut in Path("comparison/networks").glob("*/predictions-*"):
        cut.write_bytes(b"cut")
    assert main([*COMPARE, "cross_entropy,post_hoc", "--seeds", "1", "--budget", "2h"]) == 0
    command = "tailor methods compare --methods cross_entropy,post_hoc --seeds 1 --against cross_entropy --budget 2h"
    assert result()["command"] == command
    assert [row["accuracy"]["all"]["value"] for row in result()["methods"]] == pytest.approx(stored)
    page = Path("comparison/comparison.html").read_text(encoding="utf-8")
    assert (
        "post_hoc" in page
        and "nothing was chosen on the test split" in page
        and "http:" not in page.split("<script")[0]
    )

    def never(*_arguments: object) -> None:
        raise AssertionError("trained again")

    for stage in (student, classifier):
        monkeypatch.setattr(stage, "run", never)
    drawn, chart = [], page_of_methods.cost_chart
    monkeypatch.setattr(page_of_methods, "cost_chart", lambda shown: drawn.append(chart(shown)) or drawn[-1])
    assert main([*COMPARE, "cross_entropy,post_hoc,gml,crt,gml_encoder", "--seeds", "2", "--against", "crt"]) == 0
    assert result()["reference"] == "crt" and [row["method"] for row in result()["methods"]] == list(rows)
    assert result()["methods"][2]["accuracy"] == rows["gml"]["accuracy"]
    points = {
        name: (x, y)
        for trace in drawn[-1]["data"]
        for name, x, y in zip(trace["text"], trace["x"], trace["y"], strict=True)
    }
    assert points == {
        name: (row["cost"]["macs"], pytest.approx(100 * row["accuracy"]["all"]["value"])) for name, row in rows.items()
    }


@pytest.mark.slow
@pytest.mark.usefixtures("project")
def test_every_method_is_trained_again_at_the_cost_of_one_of_them(capsys) -> None:
    names = ["cross_entropy", "crt", "gml"]
    assert main([*COMPARE, ",".join(names), "--seeds", "1", "--equal-cost", "gml"]) == 0
    equal, rows = result()["equal_cost"], result()["methods"]
    assert equal["method"] == "gml" and [row["method"] for row in equal["methods"]] == names
    macs = [row["cost"]["macs"] for row in equal["methods"]]
    assert max(macs) == macs[2] == rows[2]["cost"]["macs"] and equal["methods"][2]["accuracy"] == rows[2]["accuracy"]
    for row, before in zip(equal["methods"][:2], rows[:2], strict=True):
        assert row["epochs"] > before["epochs"] == 2
        # One more epoch would cost more than gml.
        assert row["cost"]["macs"] + before["cost"]["macs"] / 2 > macs[2]
    assert "6/6  seed 0  gml at equal cost: " in capsys.readouterr().out
    assert "At the training cost of gml" in Path("comparison/comparison.html").read_text(encoding="utf-8")


@pytest.mark.slow
@needs_chromium
@pytest.mark.usefixtures("project")
def test_on_a_phone_the_picture_of_cost_keeps_the_width_for_which_its_names_are_placed() -> None:
    assert main([*COMPARE, "cross_entropy,post_hoc,label_smoothing", "--seeds", "1"]) == 0
    with started() as browser:
        reader = Reader(browser, Path("comparison/comparison.html").absolute(), viewport={"width": 390, "height": 844})
        plot = reader.evaluate("document.querySelector('#cost .bglayer .bg').getBoundingClientRect().width")
        page = reader.evaluate("document.documentElement.scrollWidth")
    assert plot > page_of_methods.WIDTH - 20 and page == 390


@pytest.mark.slow
@pytest.mark.usefixtures("project")
def test_a_killed_comparison_keeps_its_finished_runs_and_resumes(monkeypatch, capsys) -> None:
    train, trained = student.run, []

    def killed(*arguments):
        if trained:
            raise KeyboardInterrupt
        trained.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(student, "run", killed)
    assert main([*COMPARE, "cross_entropy,balanced_softmax", "--seeds", "1"]) == 130
    assert [row["method"] for row in result()["methods"]] == ["cross_entropy"]
    monkeypatch.setattr(student, "run", lambda *arguments: trained.append(arguments) or train(*arguments))
    assert main([*COMPARE, "cross_entropy,balanced_softmax", "--seeds", "1"]) == 0
    assert len(trained) == 2 and len(result()["methods"]) == 2
    # Other data are other runs.
    labels = Path("artifacts/prior.json")
    labels.write_text(labels.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert main([*COMPARE, "cross_entropy", "--seeds", "1"]) == 0
    assert len(trained) == 3
    assert "trained before" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("project")
def test_a_run_that_would_exceed_the_budget_is_not_started_and_is_listed(capsys) -> None:
    assert main([*COMPARE, "cross_entropy", "--seeds", "1"]) == 0
    (record,) = Path("comparison/networks").glob("*/record.json")
    content = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps({**content, "wall": 3600.0}), encoding="utf-8")
    assert main([*COMPARE, "cross_entropy,balanced_softmax", "--seeds", "2", "--budget", "30m"]) == 0
    missing = [(entry["method"], entry["seed"], entry["reason"]) for entry in result()["missing"]]
    assert missing == [
        ("balanced_softmax", 0, "budget"),
        ("cross_entropy", 1, "budget"),
        ("balanced_softmax", 1, "budget"),
    ]
    assert not result()["complete"]
    assert (
        "missing: balanced_softmax, seed 0, 1: not started, because it would exceed --budget" in capsys.readouterr().out
    )


@pytest.mark.slow
@pytest.mark.usefixtures("project")
def test_a_run_that_diverges_is_listed_and_the_others_go_on(monkeypatch) -> None:
    train = classifier.run

    def diverged(params, *folders):
        if params.classifier.kind == "crt":
            raise StageError("classifier: a trained value is not finite")
        return train(params, *folders)

    monkeypatch.setattr(classifier, "run", diverged)
    assert main([*COMPARE, "crt,ncm", "--seeds", "1"]) == 1
    assert [row["method"] for row in result()["methods"]] == ["ncm"]
    assert result()["missing"][0]["reason"] == "classifier: a trained value is not finite"


REFUSED = {
    ("gmll",): "'gmll' is no method; did you mean gml",
    (
        "mislas_mixup",
    ): "mislas_mixup does not apply to this project: recipes/methods/mislas_mixup.yaml: student.augment.mix",
    ("all", "--against", "mislas_mixup"): "mislas_mixup does not apply to this project",
    ("gml, mislas_mixup",): "mislas_mixup does not apply to this project",
    ("gml", "--seeds", "0"): "Invalid value for '--seeds': Input should be greater than or equal to 1, not '0'",
    ("gml", "--budget", "soon"): "--budget is 'soon'; expected a time above 0 such as 90s, 30m or 2h",
    ("gml", "--budget", "0m"): "--budget is '0m'",
    ("gml", "--against", "crt"): "--against is 'crt'; expected one of --methods: gml",
    ("gml", "--equal-cost", "crt"): "--equal-cost is 'crt'; expected one of --methods: gml",
    ("",): "--methods is empty",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
@pytest.mark.usefixtures("project")
def test_bad_arguments_are_refused_before_anything_is_written(arguments, capsys) -> None:
    assert main([*COMPARE, *arguments]) == 2
    assert REFUSED[arguments] in capsys.readouterr().err and not Path("comparison").exists()


@pytest.mark.usefixtures("project")
def test_an_output_that_is_a_file_or_holds_other_files_is_refused_and_not_changed(capsys) -> None:
    Path(".gitignore").write_text("/data\n", encoding="utf-8")
    assert main([*COMPARE, "gml", "--output", "."]) == 2
    assert "--output is ., which holds other files; expected a new or empty folder" in capsys.readouterr().err
    assert Path(".gitignore").read_text(encoding="utf-8") == "/data\n" and not Path(".lock").exists()
    assert main([*COMPARE, "gml", "--output", "params.yaml"]) == 2
    assert "--output is params.yaml, a file; expected" in capsys.readouterr().err


def test_task_segmentation_is_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    made = segmentation_params(label_map_folder(tmp_path / "source"))
    Path("params.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")), encoding="utf-8")
    assert main([*COMPARE, "cross_entropy"]) == 2
    assert "task is segmentation; expected classification" in capsys.readouterr().err


def test_a_project_without_a_split_is_refused(tmp_path, monkeypatch, split_project, capsys) -> None:
    shutil.copy(split_project[0] / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([*COMPARE, "gml"]) == 2
    assert "data/split/train.parquet: no such file; run `dvc repro embed` first" in capsys.readouterr().err


@pytest.mark.usefixtures("project")
def test_a_method_whose_second_stage_lacks_validation_images_is_refused_or_left_out(capsys) -> None:
    path = Path("data/split/validation.parquet")
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.slice(0, 0), path)
    assert main([*COMPARE, "tau_norm"]) == 2
    message = capsys.readouterr().err
    assert "tau_norm does not apply to this project: classifier.tau is null" in message
