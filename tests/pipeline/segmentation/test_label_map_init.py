"""`tailor init` on a folder of label maps: the proposed params.yaml is valid and fits the folder."""

from __future__ import annotations

import json
import os

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
from tests.support.making import folder, write


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Straße\nb\nc".encode("latin-1"), "classes.txt: is not UTF-8; convert it to UTF-8"),
        ("e\u0301\n\u00e9\nc".encode(), "classes.txt: has 3 names, 2 of them different"),
    ],
)
def test_names_that_cannot_be_used_are_refused_with_their_file(project, capsys, content, message):
    write(project / "scenes/classes.txt", content)
    assert main(["init", "scenes"]) == 1
    assert message in capsys.readouterr().err and (project / "params.yaml").read_text() == default_params()


def test_names_are_read_without_a_byte_order_mark_and_in_composed_form(project):
    write(project / "scenes/classes.txt", "e\u0301\nb\nc".encode("utf-8-sig"))
    assert inspect_label_maps(project / "scenes").names == ["\u00e9", "b", "c"]


@pytest.mark.parametrize(("part", "images"), [("", 2), ("train", 1)])
def test_too_few_images_for_training_are_refused(tmp_path, part, images):
    label_map_folder(tmp_path, images, part)
    summary = inspect_label_maps(tmp_path)
    with pytest.raises(DataError, match=rf"scenes: has {images} training images? .* 1 remains .* at least 2"):
        suggest_label_map_params(summary, "scenes", gpu=False)


def test_a_path_that_is_not_utf8_is_refused(project, capsys):
    location = os.fsdecode(b"sc\xff")
    (project / "scenes").rename(project / location)
    assert main(["init", location]) == 2
    assert "its name is not UTF-8" in capsys.readouterr().err


def test_a_project_of_segmentation_becomes_one_of_classes_of_images(project, capsys):
    assert main(["init", "scenes"]) == 0
    folder(project / "photos", {"cat": 6, "dog": 6})
    assert main(["init", "photos", "--force", "--no-encoder"]) == 0
    assert "params.yaml: was of task segmentation" in capsys.readouterr().err
    params = load_params(project / "params.yaml")
    assert (params.task, params.segmentation, params.data.label_map) == ("classification", None, None)
    assert (params.student.prior_strength, params.teacher.schedule.kind) == (1.0, "cosine")


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("height", "width", "images"), [(480, 640, 20_000), (3000, 17, 3), (16, 16, 400)])
def test_proposed_params_are_valid_for_each_size(height, width, images, gpu):
    summary = LabelMapSummary("folder", {"train": images}, height, width, list("abc"), True, [], [])
    text, params = write_text(default_params(), suggest_label_map_params(summary, "data/source", gpu))
    assert all(side % 8 == 0 and 16 <= side <= 512 for side in params.segmentation.canvas)
    assert params.student.batch_size <= images and ("with a GPU" in text) == (not gpu)
