"""`tailor init` on a folder of label maps: the proposed params.yaml is valid and fits the folder."""

from __future__ import annotations

import json

import pytest
import yaml

from pipeline import prior, split
from pipeline.commands.app import main
from pipeline.params import load_params
from pipeline.preparation.first_params import write_text
from pipeline.preparation.project import default_params
from pipeline.segmentation.first_params import LabelMapSummary, inspect_label_maps, suggest_label_map_params
from pipeline.shared.errors import DataError
from tests.support.label_maps import CLASSES, label_map_folder
from tests.support.making import write


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The default params.yaml, and 20 scenes of 24x32 pixels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(default_params())
    label_map_folder(tmp_path / "scenes", 20)
    return tmp_path


def test_init_proposes_params_with_which_the_stages_run(project, capsys):
    write(project / "scenes/classes.txt", "\n".join(CLASSES).encode())
    assert main(["init", "scenes"]) == 0
    printed = capsys.readouterr()
    assert "20 images with label maps of 3 classes; 32x24 pixels in the median" in printed.out
    assert printed.err == ""
    params = load_params(project / "params.yaml")
    assert params.task == "segmentation" and params.data.label_map.class_names == CLASSES
    assert params.segmentation.canvas == [24, 32] and params.segmentation.augment.scale == [32, 24]
    assert (params.student.queue_total, params.student.queue_minimum) == (2048, 341)
    sizes = split.run(params).sizes
    assert sizes["test"] == 4 and sizes["validation"] == 1
    assert prior.run(params).classes == CLASSES
    again = yaml.safe_load((project / "params.yaml").read_text())
    assert (
        again["teacher"]["schedule"]["kind"] == "poly"
        and "# names from classes.txt" in (project / "params.yaml").read_text()
    )


def test_classes_without_names_get_numbers_and_a_warning(project, capsys):
    assert main(["init", "scenes", "--json", "--dry-run"]) == 0
    printed = capsys.readouterr()
    names = json.loads(printed.out)["data.label_map"]["value"]["class_names"]
    assert (
        names == ["class 0", "class 1", "class 2"] and "write their names, one a line, into classes.txt" in printed.err
    )
    write(project / "scenes/classes.txt", b"road\ncar")
    with pytest.raises(DataError, match=r"classes.txt: has 2 names, 2 of them different; .* from 3, as label 2 occurs"):
        inspect_label_maps(project / "scenes")
    (project / "scenes/classes.txt").unlink()
    assert main(["init", "scenes", "--force", "--encoder", "efficientnet-lite0"]) == 2
    assert "whose networks have no encoder" in capsys.readouterr().err


def test_the_layout_of_ade20k_is_detected(tmp_path):
    for part, prefix in (("training", "ADE_train_"), ("validation", "ADE_val_")):
        label_map_folder(tmp_path, 3, part)
        for kind in ("images", "annotations"):
            for path in sorted((tmp_path / kind / part).iterdir()):
                path.rename(path.with_name(prefix + path.name))
    summary = inspect_label_maps(tmp_path)
    assert (summary.source, summary.splits, len(summary.names)) == ("ade20k", {"train": 3, "test": 3}, 2)
    assert suggest_label_map_params(summary, "x", gpu=False)["data.label_map"][0]["reduce_zero_label"]


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("height", "width", "images"), [(480, 640, 20_000), (3000, 17, 3), (16, 16, 400)])
def test_proposed_params_are_valid_for_each_size(height, width, images, gpu):
    summary = LabelMapSummary("folder", {"train": images}, height, width, list("abc"), True, [], [])
    text, params = write_text(default_params(), suggest_label_map_params(summary, "data/source", gpu))
    assert all(side % 8 == 0 and 16 <= side <= 512 for side in params.segmentation.canvas)
    assert params.student.batch_size <= images and ("with a GPU" in text) == (not gpu)
