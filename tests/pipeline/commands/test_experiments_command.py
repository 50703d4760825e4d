"""`tailor experiments`: the runs stored by DVC, with metrics and changed params, within 120 columns."""

from __future__ import annotations

import io
import json

import pytest

from pipeline.commands.app import main
from pipeline.commands.experiments import experiments_table, read_experiments
from pipeline.flows.dvc_experiments import save_experiment
from pipeline.params import load_params
from serving.shared.terminal import Console
from tests.pipeline.flows.test_flows_experiments import REFUSED, committed, folder, project  # noqa: F401

FILE = "artifacts/evaluation/metrics/student_balanced.json"


def run_of(epochs: int, accuracy: float | None, **more: object) -> dict[str, object]:
    """Return a run in the format of `dvc exp show --json`; without metrics where accuracy is None."""
    metrics = {} if accuracy is None else {FILE: {"data": {"all": accuracy, "few": accuracy / 2, "nll": 1.0}}}
    params = {"student": {"epochs": epochs, "batch_size": 64}, "seeds": [1, 2]}
    return {"timestamp": "2026-11-28T07:59:17", "params": {"params.yaml": {"data": params}}, "metrics": metrics, **more}


LONG = "retrain-20261128-075917-undecided"
CONTENT = [
    {"rev": "workspace", "name": None, "data": run_of(30, 0.875) | {"timestamp": None}, "experiments": None},
    {
        "rev": "cb5272df" * 5,
        "name": "main",
        "data": run_of(20, 0.5),
        "experiments": [
            {"revs": [{"rev": "61dfa35f" * 5, "name": LONG, "data": run_of(25, 0.75)}]},
            {"revs": [{"rev": "71dfa35f" * 5, "name": "damaged", "data": None}]},
        ],
    },
    {"rev": "ab5272df" * 5, "name": None, "data": run_of(10, None), "experiments": None},
]


def test_each_run_has_its_metrics_and_the_params_that_differ_from_its_commit() -> None:
    workspace, commit, experiment, damaged, older = read_experiments(CONTENT, FILE)
    assert (workspace.name, workspace.since, workspace.changed) == ("workspace", None, {"student.epochs": 30})
    assert (commit.name, commit.created, commit.changed) == ("main", "2026-11-28 07:59", {})
    assert (experiment.name, experiment.since, experiment.changed) == (LONG, "main", {"student.epochs": 25})
    assert experiment.metrics == {"all": 0.75, "many": None, "medium": None, "few": 0.375, "ece": None}
    assert (damaged.since, damaged.created, damaged.changed, damaged.metrics["all"]) == ("main", "", {}, None)
    assert (older.name, older.since, older.metrics["all"]) == ("ab5272d", None, None)


def test_the_table_shows_every_name_and_metric_within_120_columns() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(experiments_table(list(read_experiments(CONTENT, FILE)), "balanced"))
    text = console.export_text()
    for part in (f"  {LONG}  ", "2026-11-28 07:59", "0.875", "0.375", "student.epochs=30"):
        assert part in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 120


@pytest.mark.slow
@pytest.mark.usefixtures("project")
def test_a_saved_run_is_listed_below_its_commit(capsys) -> None:
    save_experiment(REFUSED, "few 0.61 is below 0.70", load_params(), print)
    capsys.readouterr()
    assert main(["experiments", "--json"]) == 0
    workspace, commit, experiment = json.loads(capsys.readouterr().out)
    assert workspace["name"] == "workspace" and experiment["since"] == commit["name"]
    assert experiment["name"].endswith("-refused") and experiment["changed"]["seed"] == 5


def test_outside_a_project_the_error_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["experiments"]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("tailor: dvc exp show failed: you are not inside of a DVC repository")
        and error.count("\n") == 1
    )
