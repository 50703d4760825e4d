"""Messy image folders: foreign files in one error, skipped files counted, class folders one level too deep or high."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.command_line import stage_main
from pipeline.preparation.folder_summary import inspect_folder
from pipeline.preparation.long_tail_chart import show_long_tail
from pipeline.shared.errors import DataError, DataProblems
from pipeline.sources import open_source
from pipeline.split import run as run_split
from pipeline.training.run import Result
from serving.shared.terminal import Console
from tests.support.data_commands import command, report
from tests.support.making import data_params, folder, png, write


def error_of(root: Path) -> str:
    """Return the error of opening a folder as a source."""
    with pytest.raises(DataError) as caught:
        open_source(data_params(root, "folder").data)
    return str(caught.value)


def test_every_foreign_file_is_listed_in_one_run(tmp_path: Path) -> None:
    root = folder(tmp_path / "photos", {"train/ant": 2, "train/bee": 2, "train/cat": 0, "test/dog": 1})
    (root / "link").mkdir()
    for name in ("train/ant/notes.txt", "train/bee/a.gif", "train/bee/b.heic", "train/beside.png"):
        write(root / name, png(99))
    (root / "train/ant/more").symlink_to(root / "link")
    lines = error_of(root).splitlines()
    assert lines[0] == f"{root}: has 7 problems:"
    named = ["train/ant/more", "train/ant/notes.txt", "train/bee/a.gif", "train/bee/b.heic", "train/beside.png",
             "train/cat", "test/dog"]  # fmt: skip
    assert sorted(line.split(": ")[0].strip() for line in lines[1:]) == sorted(str(root / name) for name in named)


def test_of_many_files_with_one_problem_ten_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    root = folder(tmp_path, {"ant": 2, "bee": 2})
    for number in range(1250):
        write(root / "ant" / f"{number:04d}.gif", b"x")
    write(root / "bee/notes.txt", b"x")
    (root / "cat").mkdir()
    lines = error_of(root).splitlines()
    assert lines[0].endswith("has 1,252 problems:") and len(lines) == 13
    assert lines[11] == "  ... and 1,241 more: is not a .jpg, .jpeg, .png or .webp file; remove it or convert it"
    assert lines[12] == f"  {root}/cat: class without training images; add some or remove the folder"


def test_one_problem_stays_one_line(tmp_path: Path) -> None:
    write(folder(tmp_path, {"ant": 2, "bee": 2}) / "bee/notes.txt", b"x")
    assert error_of(tmp_path) == f"{tmp_path}/bee/notes.txt: is not a .jpg, .jpeg, .png or .webp file; " \
        "remove it or convert it"  # fmt: skip


def test_data_check_and_split_print_a_line_for_each_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "photos", {"ant": 2, "bee": 2})
    for name in ("ant/a.gif", "bee/notes.txt"):
        write(root / name, b"x")
    assert command(tmp_path, data_params(root)) == 1
    printed = capsys.readouterr().err
    assert printed.splitlines()[0] == f"tailor: {root}: has 2 problems:" and printed.count("\n") == 3
    assert stage_main(run_split, "", ["--params", str(tmp_path / "params.yaml")]) == 1
    assert capsys.readouterr().err.count("\n") == 3


@pytest.mark.parametrize("tool", ["Thumbs.db", "desktop.ini", ".DS_Store", "Picasa.ini", "Icon\r"])
def test_files_that_are_never_images_are_skipped_and_counted(
    tmp_path: Path, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "photos", {"ant": 5, "bee": 5})
    for place in (root, root / "ant", root / "bee/inner"):
        write(place / tool, b"x")
    write(root / "bee/@eaDir/0.png", png(99))
    write(root / "bee/inner/0.png", png(98))
    expected = f"4 hidden files and files or folders of tools were passed over: {tool} (3), @eaDir (1)"
    assert inspect_folder(root).remarks == [expected]
    assert inspect_folder(root).counts == [5, 6]
    assert command(tmp_path, data_params(root)) == 0
    assert report(tmp_path)["remarks"] == [expected]
    assert f"note: {expected}".replace("\r", "\\u000d") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sizes", "error_text"),
    [
        ({"photos/ant": 3, "photos/bee": 3, "test/ant": 1, "test/bee": 1},
         "test would be read as classes, but hold folders of images (ant, bee) and no train/ is beside; for splits of "
         "your own, name the folder of the training images train (photos?); otherwise move the class folders up into"),
        ({"Training/ant": 3, "Training/bee": 3, "Testing/ant": 1},
         "Testing, Training would be read as classes, but hold folders of images (ant) and no train/ is beside; for "
         "splits of your own, rename Testing to test, rename Training to train; otherwise"),
        ({"val/ant": 3, "val/bee": 3, "test/ant": 1}, "val would be read as classes"),
        ({"ant": 3, "bee": 3, "test/ant": 1, "test/bee": 1}, "test would be read as classes"),
        ({"train/ant": 3, "train/bee": 3, "testing/ant": 1},
         "testing: is not read beside train/; rename it to test, or move it out of"),
        ({"photos/ant": 3, "photos/bee": 3},
         "holds 1 class folder; expected at least 2, one per class; if the folders in {root}/photos (ant, bee) are the "
         "classes, give {root}/photos as the folder of images, or move them up into {root}"),
        ({"unpacked/photos/ant": 3, "unpacked/photos/bee": 3}, "give {root}/unpacked/photos as the folder of images"),
        ({"train/images/ant": 3, "train/images/bee": 3}, "(ant, bee) are the classes, move them up into {root}/train"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_the_classes_are_named_with_what_to_do(
    tmp_path: Path, sizes: dict[str, int], error_text: str
) -> None:
    message = error_of(folder(tmp_path, sizes))
    assert error_text.format(root=tmp_path) in message and "\n" not in message


def test_classes_that_hold_only_folders_of_images_are_read_with_a_remark(tmp_path: Path) -> None:
    root = folder(tmp_path, {"animals/ant": 2, "animals/bee": 2, "plants/oak": 2, "plants/elm": 2, "rock": 1})
    assert inspect_folder(root).remarks == [
        f"{root}: 2 of 3 classes hold folders of images and no images of their own, and each is read as one class: "
        f"animals (ant, bee), plants (elm, oak); if the inner folders are the classes, move them up into {root}"
    ]


def test_a_folder_beside_train_that_is_not_read_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/ant": 2, "train/bee": 2, "extra": 2})
    assert inspect_folder(root).remarks == [
        f"{root}/extra: not read; beside train/ only val/ (or validation/) and test/ are"
    ]


def test_a_right_folder_has_no_remarks_and_a_class_may_have_one_inner_folder(tmp_path: Path) -> None:
    assert inspect_folder(folder(tmp_path, {"ant/inner": 2, "bee": 2, "test": 2})).remarks == []


def test_more_than_one_problem_is_still_an_error_of_data(tmp_path: Path) -> None:
    assert issubclass(DataProblems, DataError) and DataProblems(tmp_path, []).exit_code == 1


def test_the_long_tail_has_class_names_and_its_scale_in_80_columns() -> None:
    console = Console(width=80, record=True)
    classes = ["ant", "bee [x]", "a name of a class that is longer than its column"]
    console.print(show_long_tail([5, 1280, 30], classes))
    lines = console.export_text().splitlines()
    assert "log scale, full length 1,280 images" in lines[0]
    assert [line.split("  ")[0] for line in lines[1:]] == ["bee [x]", "a name of a class that …", "ant"]
    assert all(len(line) <= 80 for line in lines)
    console.print(show_long_tail(list(range(100, 0, -1)), [f"c{number}" for number in range(100)]))
    assert "c0 … c4" in console.export_text()


def test_one_epoch_is_printed_in_the_singular(tmp_path: Path) -> None:
    assert str(Result({"epoch": 1, "loss": 0.5}, tmp_path)).startswith("1 epoch, loss")
    assert str(Result({"epoch": 2, "loss": 0.5}, tmp_path)).startswith("2 epochs, loss")
