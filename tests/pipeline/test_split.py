"""Stage `split`: assignment of images to splits, determinism, and each unusable image reported by name."""

import collections
import csv
import json
import re
import struct
import zlib

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import split
from pipeline.data import assignment
from pipeline.shared.errors import DataError, ParamsError
from tests.support.making import data_params, encode, folder, params, picture, png, rows_of, table, write

SPLITS = ("train", "validation", "test")


def assigned(rows, classes, **changes):
    settled = {"profile": "natural", "test_per_class": 2, "validation_per_class": 3, "validation_share": 0.2, **changes}
    return assignment.assign(
        rows, [str(c) for c in range(classes)], params({f"data.{k}": v for k, v in settled.items()}).data
    )


def by_class(rows):
    return collections.Counter(row.label for row in rows)


@given(
    st.lists(st.integers(4, 60), min_size=2, max_size=6),
    st.sampled_from(["natural", "exponential", "pareto", "step"]),
    st.integers(1, 3), st.integers(0, 6), st.floats(0, 1), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_no_image_is_in_two_splits_and_every_class_can_still_be_trained(counts, profile, test, validation, share, seed):
    changes = {
        "profile": profile, "imbalance_factor": 1.0, "test_per_class": test, "validation_per_class": validation,
        "validation_share": share, "seed": seed,
    }  # fmt: skip
    rows = rows_of(counts)
    actual = assigned(rows, len(counts), **changes)
    ids = [row.sample_id for name in SPLITS for row in actual[name]]
    assert len(set(ids)) == len(ids) and set(ids) <= {row.sample_id for row in rows}
    assert all(by_class(actual["test"])[c] == test for c in range(len(counts)))
    assert all(by_class(actual["train"])[c] >= 1 for c in range(len(counts)))
    assert all(by_class(actual["validation"])[c] <= validation for c in range(len(counts)))
    assert assigned(rows, len(counts), **changes) == actual
    if profile == "natural":
        assert len(ids) == len(rows)


def test_validation_is_balanced_and_uses_images_dropped_by_the_profile_first():
    counts = [50] * 5
    kept = assigned(rows_of(counts), 5, profile="exponential", imbalance_factor=10, validation_per_class=0)
    with_validation = assigned(rows_of(counts), 5, profile="exponential", imbalance_factor=10, validation_per_class=3)
    assert by_class(with_validation["validation"]) == dict.fromkeys(range(5), 3)
    # 48 remain after the test images: only the head class has to give up images.
    assert by_class(kept["train"]) == {0: 48, 1: 26, 2: 15, 3: 8, 4: 4}
    assert by_class(with_validation["train"]) == {0: 45, 1: 26, 2: 15, 3: 8, 4: 4}
    assert {r.sample_id for r in with_validation["train"]} < {r.sample_id for r in kept["train"]}


def test_max_per_class_cuts_training_and_validation_before_the_profile_and_leaves_the_test_images():
    rows = rows_of([50, 40, 12, 6])
    whole, cut = (assigned(rows, 4, max_per_class=n, validation_per_class=2) for n in (None, 10))
    assert cut["test"] == whole["test"] and by_class(cut["test"]) == dict.fromkeys(range(4), 2)
    assert {c: by_class(cut["train"])[c] + by_class(cut["validation"])[c] for c in range(4)} == {
        0: 10,
        1: 10,
        2: 10,
        3: 4,
    }
    tailed = assigned(rows, 4, max_per_class=10, profile="exponential", imbalance_factor=5, validation_per_class=2)
    # 34 images remain; the head's size is their mean, 8.5; the profile of all images would start at 25.
    assert by_class(tailed["train"]) == {0: 8, 1: 4, 2: 2, 3: 1} and by_class(tailed["validation"])[0] == 2
    assert assigned(rows, 4, max_per_class=10, seed=1)["train"] != cut["train"]


def test_a_small_class_gives_at_most_its_share_to_validation():
    actual = assigned(rows_of([102, 12, 4, 3]), 4, validation_per_class=10, validation_share=0.2)
    assert by_class(actual["validation"]) == {0: 10, 1: 2}
    assert by_class(actual["train"]) == {0: 90, 1: 8, 2: 2, 3: 1}


def test_splits_of_the_source_are_unchanged():
    rows = rows_of([10, 5]) + rows_of([2, 1], "validation") + rows_of([1, 4], "test")
    actual = assigned(rows, 2)
    assert {name: [row.sample_id for row in actual[name]] for name in ("validation", "test")} == {
        name: [row.sample_id for row in rows if row.split == name] for name in ("validation", "test")
    }
    assert by_class(actual["train"]) == {0: 10, 1: 5}
    imbalanced = assigned(rows, 2, profile="step", imbalance_factor=7)
    assert by_class(imbalanced["train"]) == {0: 7, 1: 1} and len(imbalanced["test"]) == 5


def test_a_class_too_small_to_hold_out_a_test_from_is_named():
    with pytest.raises(
        DataError, match=r"class '1' has 2 images, too few to hold out data.test_per_class = 2 and train"
    ):
        assigned(rows_of([5, 2]), 2)


def test_an_imbalance_that_empties_the_tail_names_its_key():
    with pytest.raises(
        ParamsError, match=r"^data.profile step with imbalance factor 30 .* lower the factor to at most 10$"
    ):
        assigned(rows_of([12, 12]), 2, profile="step", imbalance_factor=30)


def read(output):
    return {name: pyarrow.parquet.read_table(output / f"{name}.parquet").to_pylist() for name in SPLITS}


def test_the_stage_writes_the_same_bytes_every_time(tmp_path):
    made = data_params(folder(tmp_path / "source", {"ant": 9, "bee": 6, "cat": 5}))
    first, second = tmp_path / "first", tmp_path / "second"
    result = split.run(made, first)
    split.run(made, second)
    names = sorted(path.name for path in first.iterdir())
    tables = ["test.parquet", "train.parquet", "validation.parquet"]
    assert names == ["classes.json", "duplicates.csv", "skipped.csv", *tables]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert json.loads((first / "classes.json").read_text()) == ["ant", "bee", "cat"]
    assert (
        {name: len(rows) for name, rows in read(first).items()}
        == result.sizes
        == {"train": 11, "validation": 3, "test": 6}
    )
    assert "3 classes; 11 train, 3 validation, 6 test; 0 images shared by splits" in str(result)
    other = tmp_path / "other"
    split.run(data_params(tmp_path / "source", seed=1), other)
    assert (other / "test.parquet").read_bytes() != (first / "test.parquet").read_bytes()


def test_a_duplicate_across_splits_is_reported_and_stays(tmp_path, capsys):
    root = folder(tmp_path / "source", {"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 2})
    write(root / "test/a/copy.png", (root / "train/a/000.png").read_bytes())
    write(root / "test/b/copy.png", (root / "train/a/001.png").read_bytes())
    result = split.run(data_params(root, validation_per_class=0), tmp_path / "out")
    assert result.duplicates == 2
    with (tmp_path / "out/duplicates.csv").open() as stream:
        actual = [(row["split"], row["sample_id"], row["class"]) for row in csv.DictReader(stream)]
    assert sorted(actual) == [
        ("test", "test/a/copy.png", "a"), ("test", "test/b/copy.png", "b"),
        ("train", "train/a/000.png", "a"), ("train", "train/a/001.png", "a"),
    ]  # fmt: skip
    assert f"2 images are in more than one split; see {tmp_path}/out/duplicates.csv" in capsys.readouterr().err


def test_one_image_under_two_labels_is_rejected_naming_both(tmp_path):
    root = folder(tmp_path / "source", {"train/a": 4, "train/b": 4, "test/a": 1, "test/b": 1})
    write(root / "train/b/copy.png", (root / "train/a/000.png").read_bytes())
    with pytest.raises(DataError) as caught:
        split.run(data_params(root, validation_per_class=0), tmp_path / "out")
    message = str(caught.value)
    assert "train/b/copy.png" in message and "train/a/000.png" in message and "'a'" in message and "'b'" in message
    assert not (tmp_path / "out").exists()


BAD_FILES = {
    "truncated.png": (png(99)[:200], "is damaged or truncated"),
    "truncated.jpg": (encode(picture(99), "JPEG")[:300], "is damaged or truncated"),
    "letter.jpg": (b"Dear reader, this is no picture.", "is not a JPEG, PNG or WebP image"),
    "empty.png": (b"", "is empty (0 bytes)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("source", ["folder", "csv"])
def test_an_unusable_image_stops_the_stage_naming_its_file_and_keeps_the_old_output(tmp_path, name, source):
    data, message = BAD_FILES[name]
    root = folder(tmp_path / "source", {"a": 5, "b": 5})
    output = tmp_path / "out"
    split.run(data_params(root), output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    write(root / "b" / name, data)
    made = data_params(root)
    if source == "csv":
        paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*"))
        table(root / "list.csv", {"file": paths, "label": [path[0] for path in paths]})
        made = data_params(root, "table", table={"train": "list.csv", "image": None, "path": "file"})
    with pytest.raises(DataError) as caught:
        split.run(made, output)
    assert f"b/{name}: {message}" in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_missing_file_of_a_list_is_named(tmp_path):
    root = folder(tmp_path / "source", {"a": 5, "b": 5})
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    table(root / "list.csv", {"file": paths, "label": [path[0] for path in paths]})
    (root / "b/003.png").unlink()
    made = data_params(root, "table", table={"train": "list.csv", "image": None, "path": "file"})
    with pytest.raises(DataError) as caught:
        split.run(made, tmp_path / "out")
    assert str(caught.value).startswith(f"1 of 10 images are missing, the first 1: {root}/b/003.png; restore them")


def test_an_unusable_image_that_no_split_takes_does_no_harm(tmp_path):
    root = folder(tmp_path / "source", {"a": 30, "b": 30})
    made = data_params(root, profile="step", imbalance_factor=20, validation_per_class=0)
    before = read(split.run(made, tmp_path / "out").output)
    taken = {row["sample_id"] for rows in before.values() for row in rows}
    spare = next(path for path in sorted(root.glob("b/*.png")) if path.relative_to(root).as_posix() not in taken)
    spare.write_bytes(b"")
    assert read(split.run(made, tmp_path / "out").output) == before


def test_grayscale_cmyk_16_bit_and_rotated_images_are_accepted(tmp_path):
    root = folder(tmp_path / "source", {"a": 4, "b": 4})
    colour = Image.fromarray(picture(1))
    write(root / "a/grey.png", encode(colour.convert("L")))
    write(root / "a/cmyk.jpg", encode(colour.convert("CMYK"), "JPEG"))
    write(root / "b/wide.png", encode(picture(2)[..., 0].astype("uint16") * 257))
    exif = Image.Exif()
    exif[0x0112] = 6
    write(root / "b/turned.jpg", encode(colour, "JPEG", exif=exif))
    assert sum(split.run(data_params(root), tmp_path / "out").sizes.values()) == 12


def spoilt(root):
    """A folder of two classes with three images that are unusable in different ways."""
    folder(root, {"a": 8, "b": 8})
    write(root / "a/empty.png", b"")
    write(root / "b/pixel.png", encode(picture(5, (1, 1))))
    (root / "b/lost.png").symlink_to(root / "nowhere.png")
    return root


def test_with_skip_unusable_images_are_excluded_counted_and_listed(tmp_path, capsys):
    root = spoilt(tmp_path / "source")
    result = split.run(data_params(root, on_bad_image="skip"), tmp_path / "out")
    assert sum(result.sizes.values()) == 16 and result.skipped == 3
    assert "; 3 images left out; 0 images shared by splits" in str(result)
    assert (
        f"split: 3 of 19 images cannot be used and were left out; see {tmp_path}/out/skipped.csv"
        in capsys.readouterr().err
    )
    with (tmp_path / "out/skipped.csv").open() as stream:
        listed = [tuple(row.values()) for row in csv.DictReader(stream)]
    assert listed == [
        ("train", "a/empty.png", "a", f"{root}/a/empty.png: is empty (0 bytes); expected a JPEG, PNG or WebP image; "
         "replace the image or remove it"),
        ("train", "b/lost.png", "b", f"{root}/b/lost.png: No such file or directory"),
        ("train", "b/pixel.png", "b", f"{root}/b/pixel.png: is a single pixel: a placeholder, not a picture; "
         "replace the image or remove it"),
    ]  # fmt: skip
    # The remaining images are split as if the others did not exist.
    for name in ("a/empty.png", "b/lost.png", "b/pixel.png"):
        (root / name).unlink()
    split.run(data_params(root), tmp_path / "clean")
    assert all(
        (tmp_path / "out" / f"{n}.parquet").read_bytes() == (tmp_path / "clean" / f"{n}.parquet").read_bytes()
        for n in SPLITS
    )


def test_several_unusable_images_are_counted_and_the_first_five_named(tmp_path):
    root = folder(tmp_path / "source", {"a": 5, "b": 5})
    for number in range(7):
        write(root / f"a/empty{number}.png", b"")
    with pytest.raises(DataError) as caught:
        split.run(data_params(root, test_per_class=1), tmp_path / "out")
    message = str(caught.value)
    assert re.match(r"[67] of 1[0-9] images cannot be used: ", message) and message.count("is empty (0 bytes)") == 5
    assert message.endswith("; and more; or set data.on_bad_image: skip")


def test_a_class_that_skipping_empties_is_named(tmp_path):
    root = folder(tmp_path / "source", {"a": 5, "b": 0})
    write(root / "b/empty.png", b"")
    with pytest.raises(DataError, match=r"class 'b' has no usable training image \(such classes: 1; 1 image left out"):
        split.run(data_params(root, on_bad_image="skip"), tmp_path / "out")


def test_a_lost_shard_is_no_bad_image_that_could_be_skipped(tmp_path):
    table(tmp_path / "train.parquet", {"image": [png(i) for i in range(8)], "label": [0, 1] * 4})
    data = bytearray((tmp_path / "train.parquet").read_bytes())
    data[600:2600] = bytes(2000)
    (tmp_path / "train.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"train.parquet: not readable as a table"):
        split.run(data_params(tmp_path, "table", on_bad_image="skip"), tmp_path / "out")


def promised(width, height):
    """Return a PNG whose header declares the given width and height, unlike its data."""
    image = bytearray(encode(picture(3)))
    image[16:24] = struct.pack(">II", width, height)
    image[29:33] = struct.pack(">I", zlib.crc32(image[12:29]))
    return bytes(image)


ODD_FILES = {
    "single.png": (encode(picture(1, (1, 1))), "is a single pixel: a placeholder, not a picture"),
    "huge.png": (promised(30_000, 30_000), "has more pixels than the limit of 50000000"),
    "moving.jpg": (
        encode(Image.fromarray(picture(1)), "GIF", save_all=True, append_images=[Image.fromarray(picture(2))]),
        "is not a JPEG, PNG or WebP image",
    ),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_file_that_is_a_picture_but_none_to_learn_from_is_named(tmp_path, name):
    data, message = ODD_FILES[name]
    root = folder(tmp_path / "source", {"train/a": 3, "train/b": 3, "test/a": 1})
    write(root / "train/b" / name, data)
    with pytest.raises(DataError) as caught:
        split.run(data_params(root), tmp_path / "out")
    assert f"train/b/{name}: {message}" in str(caught.value)


def test_a_palette_image_with_alpha_and_an_animated_webp_are_accepted(tmp_path):
    root = folder(tmp_path / "source", {"train/a": 3, "train/b": 3, "test/a": 1})
    frame = Image.fromarray(picture(1))
    write(root / "train/a/palette.png", encode(frame.convert("P"), transparency=0))
    write(
        root / "train/b/moving.webp", encode(frame, "WEBP", save_all=True, append_images=[Image.fromarray(picture(2))])
    )
    assert split.run(data_params(root, validation_per_class=0), tmp_path / "out").sizes["train"] == 8
