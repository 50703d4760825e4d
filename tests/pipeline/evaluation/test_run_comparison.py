"""Comparison of two runs: per class and in total, in the terminal, as JSON and as a page; and incomparable runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from pipeline.commands.app import main
from pipeline.evaluation.comparison import compare_classes, mcnemar
from pipeline.evaluation.run_comparison import compare_runs
from pipeline.evaluation.runs import load_run
from pipeline.params import GateParams
from pipeline.shared.errors import ParamsError
from pipeline.split import run as split
from serving.promotion.promotion import promote
from serving.repository.writer import write_repository
from tests.serving.conftest import CLASSES, write_export
from tests.support.gate_answers import COUNTS, LABELS, C, answering, answers_of, contender
from tests.support.making import data_params, folder

pytestmark = pytest.mark.slow

FAST = GateParams(resamples=200)
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.invalid")


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.floats(0.1, 0.95), st.floats(0.1, 0.95))
def test_swapping_the_runs_mirrors_every_class(seed, one, other):
    a, b = answers_of(answering(one, seed)), answers_of(answering(other, seed + 1))
    for forward, backward in zip(compare_classes(a, b, 0.95), compare_classes(b, a, 0.95), strict=True):
        assert (forward.difference, forward.won, forward.p, forward.q) == (
            -backward.difference,
            backward.lost,
            backward.p,
            backward.q,
        )
        assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))
        assert -1 <= forward.low <= forward.difference <= forward.high <= 1


def test_a_class_has_mcnemars_p_and_q_of_benjamini_and_hochberg():
    a, b = answers_of(answering(0.6, 1)), answers_of(answering([0.6] * (C - 1) + [0.05], 2))
    rows = compare_classes(b, a, 0.95)
    right = [run.probabilities.argmax(1) == LABELS for run in (a, b)]
    for c, row in enumerate(rows):
        assert row.p == pytest.approx(mcnemar(*(r[c == LABELS] for r in right), np.ones((c == LABELS).sum()), FAST))
        assert row.difference == pytest.approx(right[1][c == LABELS].mean() - right[0][c == LABELS].mean())
        assert (row.test_count, row.train_count) == (60, COUNTS[c])
    assert [row.q for row in rows] == pytest.approx(false_discovery_control([row.p for row in rows]).tolist())
    assert rows[-1].high < 0 and rows[-1].q < 0.01 and min(row.q for row in rows[:-1]) > 0.05


def test_the_interval_of_a_class_covers_the_true_difference_within_binomial_noise():
    covered = []
    for seed in range(100):
        pair = answers_of(answering(0.8, 2 * seed)), answers_of(answering(0.7, 2 * seed + 1))
        covered += [row.low <= 0.1 <= row.high for row in compare_classes(*pair, 0.95)]
    assert 0.92 < np.mean(covered) < 0.985  # 600 classes of 40 samples


def test_an_unchanged_class_still_has_an_interval_of_positive_width():
    same = answers_of(answering(1.0, 0))
    comparison = compare_runs(same, same, ("a", "b"), FAST, 15)
    assert comparison.changed(10) == []
    assert all(row.p == row.q == 1 and row.low < -0.02 < 0.02 < row.high for row in comparison.classes)


@pytest.fixture
def runs(tmp_path):
    """Two projects with one run each: `old`, and the better `new`."""
    for name, accuracy, seed in (("old", 0.6, 0), ("new", 0.9, 1)):
        made = contender(tmp_path / name / "artifacts/evaluation", answering(accuracy, seed))
        made.prior.rename(tmp_path / name / "artifacts/prior.json")
    return tmp_path


@pytest.mark.parametrize("subfolder", ["", "artifacts", "artifacts/evaluation"])
def test_load_run_accepts_a_project_its_artifacts_and_its_evaluation(runs, subfolder):
    run_files = load_run(runs / "new" / subfolder)
    assert run_files.predictions == runs / "new/artifacts/evaluation/predictions.parquet" and run_files.prior.is_file()


def test_load_run_accepts_a_copy_of_both_files_and_names_a_missing_one(runs):
    copy = runs / "copy"
    copy.mkdir()
    with pytest.raises(ParamsError, match=r"copy: has no predictions\.parquet"):
        load_run(copy)
    shutil.copy(runs / "old/artifacts/evaluation/predictions.parquet", copy)
    with pytest.raises(ParamsError, match=r"has no prior\.json beside or above it"):
        load_run(copy)
    shutil.copy(runs / "old/artifacts/prior.json", copy)
    assert load_run(copy).prior == copy / "prior.json"
    with pytest.raises(ParamsError, match="no such folder"):
        load_run(runs / "nowhere")


def test_the_command_prints_tables_or_json_and_writes_the_page(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["compare", "old", "new", "--html", "page.html", "--classes", "3"]) == 0
    printed = capsys.readouterr().out
    assert "new against old: 360 test images, balanced prior" in printed and "page → page.html" in printed
    assert "the 3 with the smallest q" in printed and "\x1b[" not in printed
    assert "tailor compare old new" in Path("page.html").read_text()
    assert main(["compare", "old", "new", "--json", "--prior", "train"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["target_prior"] == "train" and len(content["classes"]) == C
    measure = content["measures"]["all"]
    assert measure["difference"] == pytest.approx(measure["after"] - measure["before"])
    assert 0 < measure["low"] < measure["difference"] < measure["high"]


def test_runs_with_different_classes_or_samples_are_refused_by_name(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    contender(runs / "classes", answering(0.6, 0), classes=["owl", *"bcdef"])
    contender(runs / "samples", answering(0.6, 0), ids=[f"other{i}" for i in range(len(LABELS))])
    for name, message in (
        ("classes", "classes and old have different classes: only one has 'b'"),
        ("samples", "samples and old were tested on different samples (720"),
    ):
        assert main(["compare", "old", name]) == 1
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_a_name_that_is_no_folder_version_or_revision_is_misuse(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    for arguments, status, message in (
        (["old", "nosuch"], 2, "'nosuch' is no folder, and a revision needs a git repository"),
        (["old", "3"], 2, "params.yaml: no such file; pass the recipe with the version's images as --params FILE"),
        (["old", "new", "--prior", "uniform"], 2, "--prior"),
        (["old", "new", "--params", "nosuch.yaml"], 2, "nosuch.yaml"),
        (["old"], 2, "Missing argument"),
    ):
        assert main(["compare", *arguments]) == status
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1


def test_two_revisions_are_compared_from_dvcs_cache(runs, monkeypatch, capsys):
    """Compare files of two commits; those of the first are not checked out."""
    project = runs / "new"
    monkeypatch.chdir(project)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def run(*command):
        subprocess.run(command, check=True, capture_output=True)

    def keep(message):
        run("dvc", "add", "--quiet", "artifacts/evaluation/predictions.parquet")
        run(*GIT, "add", "-A")
        run(*GIT, "commit", "--quiet", "-m", message)

    run("git", "init", "--quiet", ".")
    run("dvc", "init", "--quiet")
    run(*GIT, "commit", "--quiet", "-m", "nothing yet")
    keep("new")
    shutil.copy(runs / "old/artifacts/evaluation/predictions.parquet", "artifacts/evaluation/predictions.parquet")
    keep("old")
    assert main(["compare", "HEAD", "HEAD~1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measures"]["all"]["difference"] > 0.2
    assert main(["compare", "HEAD", "HEAD~2"]) == 1
    assert "HEAD~2: has no artifacts/evaluation/predictions.parquet" in capsys.readouterr().err
    assert main(["compare", "HEAD", "nosuch"]) == 2
    assert "'nosuch' is no folder, no published version and no revision" in capsys.readouterr().err
    shutil.rmtree(".dvc/cache")
    assert main(["compare", ".", "HEAD~1"]) == 1
    assert "in DVC's cache or remote; run `dvc fetch`" in capsys.readouterr().err


@pytest.fixture
def retrained(tmp_path, monkeypatch):
    """A project after a retraining: `releases` with champion 2, and `artifacts/repository` with a single version."""
    monkeypatch.chdir(tmp_path)
    params = data_params(folder(Path("source"), dict.fromkeys(CLASSES, 8)))
    Path("params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    split(params)
    for seed in (1, 2):
        write_export(Path("exports", str(seed)), seed)
    for repository in ("artifacts/repository", "releases"):
        write_repository(Path("exports/1"), Path(repository))
    promote(Path("releases"), Path("exports/2"), servers=[], rehearsal=False)


@pytest.mark.usefixtures("retrained")
def test_compare_uses_the_champion_of_releases_and_not_of_the_artifacts(capsys):
    assert main(["compare", "champion", "2", "--json"]) == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert content["samples"] == 2 * len(CLASSES) and all(row["won"] == row["lost"] == 0 for row in content["classes"])
    assert printed.err == ""
    assert main(["compare", "1", "champion", "--json"]) == 0
    assert any(row["won"] or row["lost"] for row in json.loads(capsys.readouterr().out)["classes"])
    assert main(["compare", "champion", "2", "--repository", "artifacts/repository"]) == 2
    assert capsys.readouterr().err == "tailor: artifacts/repository: holds no version 2; it has 1\n"


@pytest.mark.usefixtures("retrained", "runs")
def test_comparing_folders_prints_nothing_about_a_repository(capsys):
    assert main(["compare", "old", "new", "--json"]) == 0
    assert capsys.readouterr().err == ""
