"""Retraining of a segmentation project with real stages, up to the decision of the gate."""

from __future__ import annotations

import pytest
import yaml

from tests.support.label_maps import label_map_folder, segmentation_params
from tests.support.project import Project
from tests.support.retraining_run import Begun

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("retrain"), pytest.mark.timeout(1800)]


def test_a_segmentation_project_is_retrained_and_judged_by_its_miou(context, tmp_path):
    project = Project(tmp_path / "project")
    source = project.root / "data/source"
    label_map_folder(source, 10, "train")
    label_map_folder(source, 4, "test")
    made = segmentation_params(
        "data/source", teacher__epochs=1, student__epochs=1, student__queue_total=24, student__queue_minimum=4,
        student__projection_dim=16, gate__floor=1.0, gate__resamples=100, retrain__rehearsal=False, retrain__retries=0,
    )  # fmt: skip
    params = made.model_dump(mode="json")
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))
    project.commit()

    below = Begun(context, project.root, "below").outcome()  # four test images do not suffice for a refusal
    assert (below.ending, "first model, mIoU" in below.message) == ("undecided", True), below
