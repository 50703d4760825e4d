"""Epochs of a method at the training cost of another one, and rows of the comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.class_prior import Prior
from pipeline.methods.catalogue import find_methods
from pipeline.methods.comparison import Comparison, Project, Run, planned_runs
from pipeline.methods.cost import Cost, Served, refit_cost, with_macs
from pipeline.methods.networks import Trained, _training_seconds
from pipeline.methods.page import as_json
from pipeline.methods.rows import rows_of
from tests.support.making import params as default_params

PRIOR = Prior(["a", "b"], [6, 2], [0.75, 0.25], [-0.3, -1.4], ["many", "few"])
LABELS = np.repeat([0, 1], 20)


def costs(**macs: int) -> dict[str, Cost]:
    return {stage: Cost(0, 0, number) for stage, number in macs.items()}


@pytest.mark.parametrize(
    ("stages", "macs"),
    [
        (costs(student=400), 1333),
        (costs(teacher=100, student=700), 2000),
        (costs(teacher=200, student=600), 301),
        (costs(student=200, classifier=50), 900),
        (costs(student=100), 29),  # 100 * (29 / 100) < 29
    ],
)
def test_the_epochs_cost_what_is_given_and_one_more_would_cost_more(stages: dict[str, Cost], macs: int) -> None:
    params = default_params()
    params = params.model_copy(update={"student": params.student.model_copy(update={"epochs": 100})})
    made = with_macs(params, stages, macs)

    def cost(extra: int) -> float:
        new = {stage: getattr(made, stage).epochs + extra for stage in stages if stage != "classifier"}
        parts = [stages[stage].macs * epochs / getattr(params, stage).epochs for stage, epochs in new.items()]
        return sum(parts) + (stages["classifier"].macs if "classifier" in stages else 0)

    assert cost(0) <= macs < cost(1)
    assert "teacher" in stages or made.teacher == params.teacher


def test_the_schedule_keeps_its_form_and_the_own_cost_changes_nothing() -> None:
    params = default_params()
    schedule = params.student.schedule.model_copy(
        update={"kind": "steps", "warmup_epochs": 5, "milestones": [160, 180]}
    )
    student = params.student.model_copy(update={"epochs": 200, "schedule": schedule})
    params = params.model_copy(update={"student": student})
    longer = with_macs(params, costs(student=100), 300).student
    assert (longer.epochs, longer.schedule.warmup_epochs, longer.schedule.milestones) == (600, 15, [480, 540])
    assert with_macs(params, costs(teacher=30, student=70), 100) == params
    shortest = with_macs(params, costs(student=100), 0).student
    assert (shortest.epochs, shortest.schedule.warmup_epochs) == (1, 1)


def test_a_second_stage_costs_its_counted_steps_and_the_forward_passes_of_its_views_and_shifted_images() -> None:
    record = {"views": 2, "shift_images": 30, "fits": [{"steps": 3, "step_macs": 5}, {"steps": 4, "step_macs": 6}]}
    served = Served(parameters=0, macs=7)
    assert refit_cost(record, 10, served, stored=False) == Cost(0, 50, 50 * 7 + 39)
    assert refit_cost(record, 10, served, stored=True) == Cost(0, 0, 39)


def test_the_seconds_of_a_run_include_its_pretraining(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "images_per_second": 4}\n', encoding="utf-8")
    assert _training_seconds(tmp_path, batch=8, images=20) == 4
    (tmp_path / "pretraining.jsonl").write_text('{"epoch": 1, "images_per_second": 2}\n', encoding="utf-8")
    assert _training_seconds(tmp_path, batch=8, images=20) == 12


def comparison(right: dict[str, list[float]]) -> Comparison:
    """Runs of methods with a share of correct images for each seed, wrong ones last."""
    project = Project(default_params(), PRIOR, LABELS, "data")
    made = Comparison(project, find_methods([*right]), [0, 1], equal_cost="gml")
    for macs, (name, shares) in enumerate(right.items(), 1):
        for seed, share in enumerate(shares):
            predicted = np.where(np.arange(20) < round(20 * share), 0, 1)
            record = Trained("recipe", "student", 1.0, 1.0, Cost(0, 0, 100 * macs), Served(1, 1))
            run = Run(seed, 10, np.concatenate([predicted, 1 - predicted]), 0.1, [record])
            made.runs.setdefault(name, []).append(run)
    return made


def test_each_row_has_its_paired_difference_from_the_method_with_the_highest_accuracy() -> None:
    rows = rows_of(comparison({"bcl": [0.5, 0.6], "gml": [0.8, 0.9], "kd": [0.8, 0.8]}), "bcl")
    behind = {row.method.name: row.behind for row in rows}
    assert behind["gml"] is None
    assert behind["bcl"].value == pytest.approx(-0.3) and behind["bcl"].high < 0
    assert behind["kd"].value == pytest.approx(-0.05) and behind["kd"].low < 0


def test_a_seed_is_run_at_equal_epochs_and_then_at_equal_cost() -> None:
    made = comparison({"balanced_softmax": [0.5], "bcl": [0.5], "gml": [0.8]})
    made.seeds, epochs = [0, 1], default_params().student.epochs
    del made.runs["bcl"]  # a run without a result
    planned = [*planned_runs(made)]
    assert [run.name for run in planned[:6]] == [
        *("balanced_softmax", "bcl", "gml"), *(f"{name} at equal cost" for name in ("balanced_softmax", "bcl", "gml")),
    ]  # fmt: skip
    assert planned[3].network.params.student.epochs == 3 * epochs and planned[4].network is None
    assert planned[5].network.name == planned[2].network.name
    assert [run.seed for run in planned] == [0] * 6 + [1] * 6


def test_a_comparison_without_all_its_runs_is_not_complete() -> None:
    made = comparison({"bcl": [0.5, 0.6], "gml": [0.8, 0.9]})
    assert not as_json(made, "bcl", "")["complete"]  # interrupted before the runs at equal cost
    made.equal = made.runs
    assert as_json(made, "bcl", "")["complete"]
