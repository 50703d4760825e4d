"""Retraining of a segmentation project with real stages: the floor, new images with label maps, the gate, the version."""

from __future__ import annotations

import json

import pytest
import yaml

from serving.repository.release import list_versions
from tests.support.label_maps import label_map_folder, segmentation_params
from tests.support.project import Project
from tests.support.retraining_run import Begun

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("retrain"), pytest.mark.timeout(1800)]

RULES = {name: {"rule": "none"} for name in ("all", "many", "medium", "few", "ece", "nll")}


def test_new_images_with_label_maps_are_trained_judged_by_miou_and_promoted(context, tmp_path):
    project = Project(tmp_path / "project")
    source = project.root / "data/source"
    label_map_folder(source, 10, "train")
    label_map_folder(source, 4, "test")
    made = segmentation_params(
        "data/source", teacher__epochs=1, student__epochs=1, student__queue_total=24, student__queue_minimum=4,
        student__projection_dim=16, gate__floor=1.0, gate__resamples=100, retrain__rehearsal=False, retrain__retries=0,
    )  # fmt: skip
    params = made.model_dump(mode="json")
    params["gate"] |= RULES
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))
    project.commit()

    below = Begun(context, project.root, "below").outcome()  # four test images do not suffice for a refusal
    assert (below.ending, "first model, mIoU" in below.message) == ("undecided", True), below

    params["gate"]["floor"] = 0.0
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))
    promoted = Begun(context, project.root, "first").outcome()
    assert (promoted.ending, promoted.version) == ("promoted", 1), promoted
    first = project.root / "releases/segmenter/1"
    assert json.loads((first / "decision.json").read_text())["promote"] is True
    assert {"predictions.parquet", "prior.json", "report.html"} <= {path.name for path in first.iterdir()}

    label_map_folder(source, 3, "train/new")
    second = Begun(context, project.root, "second").outcome()
    assert (second.ending, second.version) == ("promoted", 2), second
    decision = json.loads((project.root / "releases/segmenter/2/decision.json").read_text())
    assert decision["computed"] and decision["samples"] == 4
    assert {"all", "many", "medium", "few"} < set(decision["measures"]) and "ece" not in decision["measures"]
    assert json.loads((project.root / "releases/segmenter/2/retrain.json").read_text())["compared_with"] is not None
    assert list_versions(project.root / "releases")[-1].state == "champion"
    assert Begun(context, project.root, "third").outcome().ending == "unchanged"
