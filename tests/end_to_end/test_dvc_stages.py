"""dvc.yaml with the real DVC commands: repro, experiments, cache, metrics."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.support.project import SHORT

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("digits")]

STAGES = ["split", "prior", "embed", "embed_text", "teacher", "student", "classifier", "evaluate", "export", "seeds"]
OUTS = [
    "data/split/train.parquet",
    "data/split/validation.parquet",
    "data/split/test.parquet",
    "data/split/classes.json",
    "artifacts/prior.json",
    "artifacts/teacher/model.safetensors",
    "artifacts/teacher/metrics.jsonl",
    "artifacts/student/model.safetensors",
    "artifacts/student/config.json",
    "artifacts/evaluation/metrics.json",
    "artifacts/evaluation/per_class.csv",
    "artifacts/evaluation/confusion.csv",
    "artifacts/evaluation/predictions.parquet",
    "artifacts/evaluation/report.html",
    "artifacts/export/student.onnx",
    "artifacts/export/manifest.json",
    "artifacts/export/model_card.md",
    "artifacts/repository/student/1/model.onnx",
    "artifacts/repository/classifier/1/model.py",
    "artifacts/seeds/summary.json",
]


def test_one_repro_runs_every_stage_in_order_and_writes_every_artifact(digits):
    assert digits.stages_run(digits.first) == STAGES
    assert [name for name in OUTS if not (digits.root / name).is_file()] == []


def test_training_prints_one_line_per_epoch(digits):
    for stage in ("teacher", "student"):
        lines = [line for line in digits.first.stdout.splitlines() if line.startswith(f"{stage}  epoch")]
        assert len(lines) == 12 and "epoch 12/12" in lines[-1] and "validation" in lines[-1]


def test_a_second_repro_runs_nothing(digits):
    assert digits.stages_run(digits.run("dvc", "repro")) == []


def test_the_manifest_of_the_export_has_the_sha256_of_every_file(digits):
    export = digits.root / "artifacts/export"
    manifest = json.loads((export / "manifest.json").read_text())
    for name, digest in manifest["files"].items():
        printed = digits.run("sha256sum", f"artifacts/export/{name}").stdout.split()[0]
        assert printed == digest
    assert sorted(manifest["files"]) == sorted(path.name for path in export.iterdir() if path.name != "manifest.json")


def test_dvc_shows_metrics_plots_and_dag(digits):
    metrics = json.loads(digits.run("dvc", "metrics", "show", "--json").stdout)
    shown = metrics[""]["data"]
    rows = {f"artifacts/evaluation/metrics/{n}_{p}.json" for n in ("teacher", "student") for p in ("balanced", "train")}
    assert set(shown) == rows
    expected = {"all", "many", "medium", "few", "balanced_accuracy", "top5", "nll", "ece", "nll_at_prior"}
    assert all(expected <= set(row["data"]) for row in shown.values())
    plots = json.loads(digits.run("dvc", "plots", "show", "--json").stdout)
    assert not plots.get("errors")
    digits.run("dvc", "plots", "show")
    page = (digits.root / "dvc_plots/index.html").read_text()
    for name in ("loss", "validation_accuracy", "tau_g", "accuracy_by_training_samples", "confusion"):
        assert name in page
    dag = digits.run("dvc", "dag", "--dot").stdout
    assert '"teacher" -> "student"' in dag and '"student" -> "export"' in dag


def test_a_changed_student_param_retrains_only_the_student(digits):
    teacher = (digits.root / "artifacts/teacher/model.safetensors").stat().st_mtime_ns
    done = digits.run("dvc", "exp", "run", "-S", "student.epochs=1")
    assert digits.stages_run(done) == ["student", "classifier", "evaluate", "export", "seeds"]
    assert (digits.root / "artifacts/teacher/model.safetensors").stat().st_mtime_ns == teacher
    (name,) = re.findall(r"Ran experiment\(s\): (\S+)", done.stdout)
    digits.run("git", "checkout", "params.yaml")
    # The first run's results come back from DVC's cache without training.
    assert digits.stages_run(digits.run("dvc", "repro")) == []
    # Both are listed: the workspace, and the experiment with its params and metrics.
    workspace, committed = json.loads(digits.run("dvc", "exp", "show", "--json").stdout)
    (experiment,) = (
        revision for row in committed["experiments"] for revision in row["revs"] if revision["name"] == name
    )
    shown = [experiment["data"], workspace["data"]]
    assert [row["params"]["params.yaml"]["data"]["student"]["epochs"] for row in shown] == [
        1,
        SHORT["student"]["epochs"],
    ]
    metrics = [row["metrics"]["artifacts/evaluation/metrics/student_balanced.json"]["data"]["all"] for row in shown]
    assert metrics[0] < metrics[1]
    plots = json.loads(digits.run("dvc", "plots", "diff", "--json", name).stdout)
    assert {name, "workspace"} <= {revision for plot in plots["data"]["loss"] for revision in plot["revisions"]}


def test_a_changed_second_stage_trains_no_network_again(digits):
    before = (digits.root / "artifacts/student/model.safetensors").stat().st_mtime_ns
    done = digits.run("dvc", "exp", "run", "-S", "classifier.kind=lws")
    assert digits.stages_run(done) == ["classifier", "evaluate", "export", "seeds"]
    assert (digits.root / "artifacts/student/model.safetensors").stat().st_mtime_ns == before
    manifest = json.loads((digits.root / "artifacts/export/manifest.json").read_text())
    assert manifest["tau_s"] == 1.0
    digits.run("git", "checkout", "params.yaml")
    assert digits.stages_run(digits.run("dvc", "repro")) == []


def test_a_killed_stage_leaves_no_partial_output_and_the_next_repro_completes(digits):
    output = digits.root / "artifacts/student"
    digits.set({"student": {"epochs": 400}})
    running = subprocess.Popen(
        ["dvc", "repro", "student"],
        cwd=digits.root,
        env=digits.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in running.stdout:
        if line.startswith("student  epoch 2/"):
            break
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    time.sleep(0.2)
    assert not output.exists()  # DVC removes a changed stage's out before it runs; no partial output replaced it
    digits.run("git", "checkout", "params.yaml")
    assert "student" not in digits.stages_run(digits.run("dvc", "repro"))
    assert (output / "model.safetensors").is_file()


def test_an_invalid_param_stops_before_a_file_is_written(digits):
    before = (digits.root / "artifacts/student/model.safetensors").stat().st_mtime_ns
    text = (digits.root / "params.yaml").read_text()
    (digits.root / "params.yaml").write_text(text.replace("  tau_g: 0.1", "  tau_gg: 0.1"))
    done = digits.run("python", "-m", "pipeline.student", expect=2)
    assert done.stderr.count("\n") == 1
    assert "student.tau_gg is not a key; did you mean student.tau_g?" in done.stderr
    (digits.root / "params.yaml").write_text(text)
    assert (digits.root / "artifacts/student/model.safetensors").stat().st_mtime_ns == before


def test_queues_with_too_few_entries_are_refused_before_training(digits):
    overlay = digits.root / "params-small-queue.yaml"
    overlay.write_text((digits.root / "params.yaml").read_text().replace("queue_total: 256", "queue_total: 20"))
    done = digits.run("python", "-m", "pipeline.student", "--params", overlay.name, expect=2)
    overlay.unlink()
    assert done.stderr.count("\n") == 1 and "epoch" not in done.stdout
    assert "queue total K is 20" in done.stderr and "at least 30" in done.stderr


def test_a_failed_parity_check_keeps_the_old_export(digits):
    params = digits.root / "params-strict.yaml"
    params.write_text((digits.root / "params.yaml").read_text().replace("tolerance: 0.0002", "tolerance: 1.0e-12"))
    before = (digits.root / "artifacts/export/manifest.json").read_bytes()
    done = digits.run("python", "-m", "pipeline.export", "--params", params.name, expect=1)
    params.unlink()
    assert "differs from PyTorch" in done.stderr and "nothing was exported" in done.stderr
    assert (digits.root / "artifacts/export/manifest.json").read_bytes() == before


def test_the_champion_predicts_the_test_split_as_evaluated(digits):
    done = digits.run("tailor", "compare", "champion", ".", "--json", "--prior", "train", "--html", "dvc_plots/c.html")
    content = json.loads(done.stdout)
    assert content["samples"] == 400
    assert all(row["won"] == row["lost"] == 0 for row in content["classes"])
    assert abs(content["measures"]["ece"]["difference"]) < 1e-4  # ONNX Runtime rounds differently from PyTorch
    other = digits.run("tailor", "compare", "7", ".", expect=2)
    assert other.stderr == "tailor: artifacts/repository: holds no version 7; it has 1\n"


def test_the_report_shows_the_champion_or_why_it_cannot_be_compared(digits):
    report, text = digits.root / "artifacts/evaluation/report.html", (digits.root / "params.yaml").read_text()
    champion = digits.root / "data/source/champion"
    champion.mkdir(parents=True)
    for name in ("evaluation/predictions.parquet", "prior.json"):
        shutil.copy(digits.root / "artifacts" / name, champion)
    before = undated(report)
    recipe = digits.root / "params-champion.yaml"
    recipe.write_text(text.replace("  champion: null", "  champion: data/source/champion"))
    digits.run("python", "-m", "pipeline.evaluate", "--params", recipe.name)
    assert '<th scope="row">champion</th>' in report.read_text()
    prior = json.loads((champion / "prior.json").read_text())
    (champion / "prior.json").write_text(json.dumps(prior | {"classes": [f"{name}?" for name in prior["classes"]]}))
    digits.run("python", "-m", "pipeline.evaluate", "--params", recipe.name)
    assert (
        "Without the champion of evaluate.champion: challenger and champion have different classes"
        in report.read_text()
    )
    recipe.write_text(text.replace("  champion: null", "  champion: nowhere"))
    done = digits.run("python", "-m", "pipeline.evaluate", "--params", recipe.name, expect=2)
    assert done.stderr.startswith("evaluate: nowhere: no such folder")
    recipe.unlink()
    shutil.rmtree(champion)
    digits.run("python", "-m", "pipeline.evaluate")
    assert undated(report) == before  # the same run writes the same page


def undated(report):
    """Return a report's page without the date of its evaluation."""
    return re.sub(r"Evaluated [-0-9: ]+ UTC", "", report.read_text())
