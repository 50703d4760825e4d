"""File names of images: the same rule in training, ingest and predict; copies of an image in two splits are errors."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline import split
from pipeline.command_line import stage_main
from pipeline.commands.app import main
from pipeline.ingestion.ingest import ingest
from pipeline.shared.errors import DataError
from pipeline.sources import open_source
from serving.client.images import image_files
from serving.playground.page import find_samples
from serving.shared.errors import InputError
from tests.support.data_commands import command, report, scene
from tests.support.dropping import FIRST_NEW, project
from tests.support.making import data_params, encode, folder, png, write

TOOLS = [".thumbnails", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found"]


@pytest.mark.parametrize("tool", TOOLS)
def test_images_in_a_folder_of_a_tool_are_no_images_of_the_class_anywhere(tmp_path, tool):
    params = project(tmp_path)
    expected = len(open_source(params.data).rows)
    for number in range(3):
        write(Path("source/cat") / tool / f"{number}.png", png(FIRST_NEW + number))
        write(Path("data/drop/cat") / tool / f"{number}.png", png(FIRST_NEW + 10 + number))
        write(Path("source") / tool / f"{number}.png", png(FIRST_NEW + 20 + number))
    assert len(open_source(params.data).rows) == len(image_files(Path("source"))) == expected
    assert ingest(params).added == 0 and ingest(params).quarantined == 0


@pytest.mark.parametrize("name", ["Thumbs.db", "desktop.ini", ".DS_Store", "._000.png"])
def test_desktop_files_are_skipped(tmp_path, name):
    params = project(tmp_path)
    write(Path("source/cat") / name, b"of the desktop")
    write(Path("data/drop/cat") / name, b"of the desktop")
    assert len(open_source(params.data).rows) == len(image_files(Path("source")))
    assert ingest(params).quarantined == 0


def test_a_link_to_a_folder_inside_a_class_is_named_as_such(tmp_path):
    folder(tmp_path / "photos", {"cat": 3, "dog": 3, "more": 2})
    shutil.move(tmp_path / "photos/more", tmp_path / "more")
    (tmp_path / "photos/cat/more").symlink_to(tmp_path / "more")
    with pytest.raises(DataError, match="photos/cat/more: is a link to a folder; put the images there"):
        open_source(data_params(tmp_path / "photos").data)


def test_near_duplicates_in_two_splits_are_a_problem_that_data_check_names(tmp_path, capsys):
    root = folder(tmp_path / "photos", {"train/ant": 3, "train/bee": 3, "test/ant": 2, "test/bee": 2})
    assert command(tmp_path, data_params(root, validation_per_class=0)) == 0
    assert "data check: passed" in capsys.readouterr().out
    write(root / "train/ant/scene.png", encode(scene(1)))
    write(root / "test/ant/scene.jpg", encode(scene(1), "JPEG", quality=70))
    assert command(tmp_path, data_params(root, validation_per_class=0), "--fresh") == 1
    printed = capsys.readouterr().out
    assert "data check: failed, see the problem above" in printed and "--allow-duplicates" in printed
    assert "problem: 1 group of near duplicates in two splits" in printed
    assert command(tmp_path, data_params(root, validation_per_class=0), "--allow-duplicates") == 0
    printed = capsys.readouterr().out
    assert "data check: passed, except for the duplicates above" in printed
    assert "problem: 1 group of near duplicates in two splits" in printed
    (problem,) = report(tmp_path)["problems"]
    assert "train/ant/scene.png (train)" in problem and "test/ant/scene.jpg (test)" in problem


@pytest.mark.parametrize("name", [b"cat/caf\xe9.png", b"caf\xe9/0.png"], ids=["file", "class"])
def test_a_name_that_is_not_utf8_is_one_line_in_every_command_on_the_source(tmp_path, capsys, name):
    root = folder(tmp_path / "photos", {"cat": 6, "dog": 6})
    write(root / os.fsdecode(name), png(99))
    made = data_params(root)
    shown = f"{root}/{name.decode(errors='surrogateescape')}".replace("\udce9", "\\udce9").removesuffix("/0.png")
    expected = f"{shown}: its name is not UTF-8; rename it, for instance with convmv\n"
    assert command(tmp_path, made) == 1 and capsys.readouterr().err == f"tailor: {expected}"
    assert command(tmp_path, made, str(tmp_path / "packed"), name="pack") == 1
    assert capsys.readouterr().err == f"tailor: {expected}"
    assert stage_main(split.run, "", ["--params", str(tmp_path / "params.yaml")]) == 1
    assert capsys.readouterr().err == f"split: {expected}"


def test_a_class_that_is_a_link_to_a_folder_holds_the_same_images_for_training_and_prediction(tmp_path):
    root = folder(tmp_path / "photos", {"cat": 3, "dog": 3})
    folder(tmp_path, {"eel": 4})
    (root / "eel").symlink_to(tmp_path / "eel")
    assert len(open_source(data_params(root).data).rows) == len(image_files(root)) == 10
    (tmp_path / "eel/more").symlink_to(root / "cat")
    with pytest.raises(DataError, match="photos/eel/more: is a link to a folder"):
        open_source(data_params(root).data)
    with pytest.raises(InputError, match="photos/eel/more: is a link to a folder"):
        image_files(root)


def test_a_link_to_a_folder_in_the_drop_is_named(tmp_path, capsys):
    params = project(tmp_path)
    folder(tmp_path / "more", {"x": 2})
    Path("data/drop/cat").mkdir(parents=True)
    for name in ("cat/more", "eel"):
        (Path("data/drop") / name).symlink_to(tmp_path / "more/x")
    assert ingest(params).added == 0
    printed = capsys.readouterr().err
    for name in ("cat/more", "eel"):
        assert f"data/drop/{name}: skipped, because it is a link to a folder; put the images there" in printed


def test_the_playground_offers_the_images_that_prediction_reads(tmp_path):
    folder(tmp_path, {".": 2})
    for name in ("._000.png", ".hidden.png"):
        write(tmp_path / name, b"of the desktop")
    assert find_samples(tmp_path) == image_files(tmp_path) == [tmp_path / "000.png", tmp_path / "001.png"]


@pytest.mark.parametrize("command_name", ["new", "init"])
def test_a_path_that_is_not_utf8_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, command_name):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9")
    if command_name == "init":
        folder(tmp_path / name, {"cat": 6, "dog": 6})
    before = sorted(tmp_path.rglob("*"))
    assert main([command_name, name]) == 2
    assert "caf\\udce9: its name is not UTF-8; rename it" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
