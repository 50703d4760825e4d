"""Sources imagenet_lt, places_lt, inaturalist2018: official list and JSON formats, and common wrong folder trees."""

import json

import pytest

from pipeline import split
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources import open_source
from tests.support.list_files import IMAGENET, PLACES, tree
from tests.support.making import data_params, png, write


def opened(root, name="imagenet_lt", **changes):
    return open_source(data_params(root, name, **changes).data)


def refusal(kind, root, name="imagenet_lt", **changes):
    with pytest.raises(kind) as caught:
        made = data_params(root, name, validation_per_class=0, **changes)
        split.run(made, root.parent / "out")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("folder", ["", "ImageNet_LT"])
def test_official_lists_are_found_in_the_root_or_in_their_own_folder(tmp_path, folder):
    root = tree(tmp_path / "imagenet", IMAGENET, folder)
    source = opened(root)
    assert source.classes == ["n01440764", "n01443537", "n01484850"]
    actual = [(row.reference, row.label) for row in source.rows]
    assert actual == [entry for entries in IMAGENET.values() for entry in entries]
    assert [row.split for row in source.rows] == ["train"] * 6 + ["validation"] * 3 + ["test"] * 3
    result = split.run(data_params(root, "imagenet_lt"), tmp_path / "out")
    assert result.sizes == {"train": 6, "validation": 3, "test": 3}


def test_lists_in_other_folders_are_read_from_params(tmp_path, monkeypatch):
    root = tree(tmp_path / "imagenet", IMAGENET)
    (tmp_path / "lists").mkdir()
    for path in root.glob("*.txt"):
        path.rename(tmp_path / "lists" / path.name.replace("ImageNet_LT_", "my-"))
    lists = {"train": "lists/my-train.txt", "test": str(tmp_path / "lists/my-test.txt")}
    monkeypatch.chdir(tmp_path)
    assert {row.split for row in opened(root, lists=lists).rows} == {"train", "test"}
    message = refusal(ParamsError, root, lists={"train": "lists/none.txt"})
    assert message == f"data.lists.train is 'lists/none.txt', which is not a file here or in {root}"
    assert "does not hold ImageNet_LT_train.txt; put the official lists there" in refusal(ParamsError, root)


def test_places_names_its_classes_by_the_folders_below_what_all_share(tmp_path):
    source = opened(tree(tmp_path, PLACES), "places_lt")
    assert source.classes == ["a/airfield", "a/apartment_building/outdoor", "b/bar"]
    assert [row.split for row in source.rows] == ["train"] * 4 + ["validation"] * 4 + ["test"] * 4
    assert source.rows[2].reference == "data_256/a/apartment_building/outdoor/train 1.jpg"


INATURALIST = {
    "train": [("train_val2018/Aves/2/a1.jpg", 2), ("train_val2018/Plantae/0/b1.jpg", 0), ("train_val2018/Aves/1/c1.jpg", 1),
              ("train_val2018/Plantae/0/b2.jpg", 0)],
    "val": [("train_val2018/Aves/2/a3.jpg", 2), ("train_val2018/Plantae/0/b3.jpg", 0), ("train_val2018/Aves/1/c3.jpg", 1)],
}  # fmt: skip


def inat_json(entries):
    return {
        "images": [
            {"id": 100 + i, "file_name": path, "width": 16, "height": 16} for i, (path, _) in enumerate(entries)
        ],
        "annotations": [{"id": i, "image_id": 100 + i, "category_id": label} for i, (_, label) in enumerate(entries)],
        "categories": [{"id": i, "name": str(i), "supercategory": "Aves"} for i in range(3)],
    }


@pytest.mark.parametrize("form", ["txt", "json"])
def test_inaturalist_is_read_from_lists_or_its_own_json_and_tested_on_its_validation_images(tmp_path, form):
    names = {"train": "iNaturalist18_train.txt", "val": "iNaturalist18_val.txt"}
    tree(tmp_path, {names[part]: entries for part, entries in INATURALIST.items()})
    if form == "json":
        for part, entries in INATURALIST.items():
            (tmp_path / names[part]).unlink()
            (tmp_path / f"{part}2018.json").write_text(json.dumps(inat_json(entries)))
    source = opened(tmp_path, "inaturalist2018")
    assert source.classes == ["Plantae/0", "Aves/1", "Aves/2"]
    assert [(row.reference, row.label) for row in source.rows] == INATURALIST["train"] + INATURALIST["val"]
    assert [row.split for row in source.rows] == ["train"] * 4 + ["test"] * 3
    as_validation = opened(
        tmp_path, "inaturalist2018", lists={"validation": names["val"] if form == "txt" else "val2018.json"}
    )
    assert {row.split for row in as_validation.rows} == {"train", "validation"}, "no image is in two splits"


@pytest.mark.parametrize(
    ("line", "error_text"),
    [
        ("train/x/1.JPEG 1000", "line 7: label 1000; expected 0 to 999"),
        ("train/x/1.JPEG -1", "line 7: label -1; expected 0 to 999"),
        ("train/x/1.JPEG", "line 7 is 'train/x/1.JPEG'; expected `relative/path label`"),
        ("train/x/1.JPEG one", "line 7 is 'train/x/1.JPEG one'; expected `relative/path label`"),
        ("/etc/passwd 1", "line 7: '/etc/passwd' leaves the image root; expected a path relative to it"),
        ("../../x.JPEG 1", "line 7: '../../x.JPEG' leaves the image root"),
        ("train/x/1.JPEG 4", "label 3 has no training image; labels must be 0..C-1 without a gap"),
    ],
)
def test_an_invalid_line_is_named(tmp_path, line, error_text):
    root = tree(tmp_path / "imagenet", IMAGENET)
    path = root / "ImageNet_LT_train.txt"
    path.write_text(path.read_text() + line + "\n")
    assert refusal(DataError, root).startswith(f"{path}: {error_text}")


def test_a_label_that_only_a_held_out_list_has_is_named(tmp_path):
    root = tree(tmp_path / "imagenet", IMAGENET)
    path = root / "ImageNet_LT_test.txt"
    path.write_text(path.read_text() + "val/x/1.JPEG 3\n")
    assert refusal(DataError, root) == f"{path}: val/x/1.JPEG has label 3, a class without training images"


@pytest.mark.parametrize(
    ("text", "error_text"),
    [
        ("{", "not readable as iNaturalist's JSON"),
        ("[]", "not readable as iNaturalist's JSON"),
        ('{"images": []}', "not readable as iNaturalist's JSON (no key 'annotations')"),
        ('{"images": [], "annotations": [{"image_id": 5, "category_id": 0}]}', "iNaturalist's JSON (no key 5)"),
        (
            '{"images": [{"id": 5, "file_name": "a"}], "annotations": [{"image_id": 5, "category_id": 8142}]}',
            "label 8142;",
        ),
    ],
)
def test_a_json_file_of_another_form_is_named(tmp_path, text, error_text):
    path = write(tmp_path / "train2018.json", text.encode())
    with pytest.raises(DataError) as caught:
        opened(tmp_path, "inaturalist2018")
    assert (
        str(caught.value).startswith(f"{path}: ") and error_text in str(caught.value) and "\n" not in str(caught.value)
    )


def test_a_list_that_is_an_image_is_named(tmp_path):
    path = write(tmp_path / "ImageNet_LT_train.txt", png(0))
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    assert str(caught.value) == f"{path}: is not text; expected lines of `relative/path label`"


def test_missing_images_are_counted_and_the_first_five_named(tmp_path):
    missing_paths = [path for path, _ in IMAGENET["ImageNet_LT_train.txt"]][1::2] + [
        path for path, _ in IMAGENET["ImageNet_LT_val.txt"]
    ]
    root = tree(tmp_path / "imagenet", IMAGENET, missing=missing_paths)
    first = ", ".join(f"{root}/{path}" for path in missing_paths[:5])
    assert refusal(DataError, root) == (
        f"6 of 12 images are missing, the first 5: {first}; restore them or remove them from the list, or set "
        "data.on_bad_image: skip; `tailor data check` lists them all"
    )
    missing_paths = missing_paths[:3]
    root = tree(tmp_path / "again", IMAGENET, missing=missing_paths)
    result = split.run(data_params(root, "imagenet_lt", on_bad_image="skip"), tmp_path / "out")
    assert result.skipped == 3 and result.sizes == {"train": 3, "validation": 3, "test": 3}


def moved(root, inside, outside=""):
    """Move the images of a tree into another folder, but not its lists."""
    for path in sorted(root.iterdir()):
        if path.is_dir():
            (root / inside / outside).mkdir(parents=True, exist_ok=True)
            path.rename(root / inside / outside / path.name)


def test_a_wrong_root_is_reported_with_the_right_one(tmp_path):
    deeper = tree(tmp_path / "deeper", IMAGENET)
    moved(deeper, "ILSVRC")
    assert f"12 of 12 images are missing, the first 5: {deeper}/train/n01440764/" in refusal(DataError, deeper)
    assert f"the images are under {deeper}/ILSVRC; set data.location to it" in refusal(DataError, deeper)

    shallow = tree(tmp_path / "shallow", IMAGENET)
    lists = {part: str(shallow / f"ImageNet_LT_{part}.txt") for part in ("train", "test")}
    message = refusal(DataError, shallow / "train", lists=lists)
    assert f"the lists' paths begin with train/; set data.location to {shallow}" in message

    bare = tree(tmp_path / "bare", IMAGENET)
    (bare / "train").rename(bare / "images")
    (bare / "val").rename(bare / "held")
    assert "data.location must be the folder that holds train/" in refusal(DataError, bare)


def test_unsorted_validation_images_are_reported(tmp_path):
    root = tree(tmp_path / "imagenet", IMAGENET)
    for path in sorted((root / "val").rglob("*.JPEG")):
        path.rename(root / "val" / path.name)
    message = refusal(DataError, root)
    assert f"3 of 12 images are missing, the first 3: {root}/val/n01440764/ILSVRC2012_val_00000293.JPEG" in message
    assert f"{root}/val/ holds its images flat; sort them into a folder per class" in message


def test_images_of_another_imagenet_year_are_reported(tmp_path):
    root = tree(tmp_path / "imagenet", IMAGENET)
    for path in sorted((root / "val").rglob("*.JPEG")):
        path.rename(root / "val" / path.name.replace("2012", "2010"))
    assert "the images there are of ILSVRC 2010; the lists are of ILSVRC 2012" in refusal(DataError, root)
    other = tree(tmp_path / "other", IMAGENET)
    (other / "train/n01484850").rename(other / "train/n99999999")
    message = refusal(DataError, other)
    assert (
        "1 whole folder is missing, for example train/n01484850 (another year's ImageNet? the lists are of ILSVRC 2012)"
        in message
    )


def test_an_image_that_a_published_set_lists_under_two_labels_is_kept_and_counted(tmp_path, capsys):
    root = tree(tmp_path / "imagenet", IMAGENET)
    twice = (root / "train/n01440764/n01440764_190.JPEG").read_bytes()
    (root / "train/n01443537/n01443537_24.JPEG").write_bytes(twice)
    assert split.run(data_params(root, "imagenet_lt"), tmp_path / "out").sizes["train"] == 6
    assert "split: 1 image lies under two labels; kept, as imagenet_lt is published" in capsys.readouterr().err


def test_a_line_of_megabytes_is_rejected_and_not_printed_whole(tmp_path):
    root = tree(tmp_path / "imagenet", IMAGENET)
    write(root / "ImageNet_LT_train.txt", b"train/a.JPEG 0\n" + b"x" * 3_000_000 + b" 1\n")
    message = refusal(DataError, root)
    assert "ImageNet_LT_train.txt: line 2 is 'xxx" in message and len(message) < 500
