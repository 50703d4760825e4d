"""Task segmentation before training: sources of label maps, stages split and prior, `tailor data check`, bad input."""

import json
import zlib

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from models.preprocess import ImageError
from pipeline import prior, split
from pipeline.augment import apply_crops, draw_crops
from pipeline.ingestion.ingest import ingest
from pipeline.ingestion.transaction import IngestReport
from pipeline.params import LabelMapParams, SegmentationAugmentParams
from pipeline.preparation.check import check
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources import decode_label_map, open_base_source
from tests.support.data_commands import command, report
from tests.support.label_maps import (
    CLASSES,
    SIZE,
    label_map_folder,
    label_map_table,
    labels,
    palette,
    segmentation_params,
)
from tests.support.making import data_params, encode, folder, params, picture, write

WIDTH_HEIGHT = (SIZE[1], SIZE[0])
LABEL_MAPS = LabelMapParams(class_names=CLASSES)


def rows_by_split(location, **changes):
    source = open_base_source(segmentation_params(location, **changes).data)
    return {
        name: [row.sample_id for row in source.rows if row.split == name] for name in ("train", "validation", "test")
    }


def test_a_folder_pairs_images_with_annotations_of_the_same_path(tmp_path):
    for part in ("train", "val", "test"):
        label_map_folder(tmp_path, 2, part)
    assert rows_by_split(tmp_path) == {
        "train": ["train/000.jpg", "train/001.jpg"],
        "validation": ["val/000.jpg", "val/001.jpg"],
        "test": ["test/000.jpg", "test/001.jpg"],
    }
    source = open_base_source(segmentation_params(tmp_path).data)
    assert source.read_label_map("images/val/001.jpg") == (tmp_path / "annotations/val/001.png").read_bytes()


def test_the_validation_images_of_ade20k_are_the_test_split(tmp_path):
    for part in ("training", "validation"):
        label_map_folder(tmp_path, 1, part)
    assert rows_by_split(tmp_path, source="ade20k") == {
        "train": ["training/000.jpg"], "validation": [], "test": ["validation/000.jpg"],
    }  # fmt: skip


def test_a_column_of_a_table_has_the_split_of_each_row(tmp_path):
    label_map_table(tmp_path / "street.parquet", ["train", "val", "test", "train"])
    settings = {"source": "table", "data__table": {"train": "street.parquet", "split": "split", "id": "name"}}
    assert rows_by_split(tmp_path, **settings) == {
        "train": ["scene-0", "scene-3"], "validation": ["scene-1"], "test": ["scene-2"],
    }  # fmt: skip
    label_map_table(tmp_path / "street.parquet", ["train", "dev"])
    with pytest.raises(DataError, match="column 'split' has the value 'dev'; expected train, "):
        rows_by_split(tmp_path, **settings)


def test_zero_is_no_class_with_reduce_zero_label_and_255_stays_255():
    reduced = LabelMapParams(class_names=CLASSES, reduce_zero_label=True)
    stored = np.array([[0, 1, 2, 3, 255]], dtype=np.uint8)
    assert decode_label_map(encode(stored), (5, 1), reduced).tolist() == [[255, 0, 1, 2, 255]]


def test_the_indexes_of_a_palette_are_the_labels():
    made = labels(1)
    assert (decode_label_map(palette(made), WIDTH_HEIGHT, LABEL_MAPS) == made).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode(labels(0, (24, 31))), "has 31x24 pixels, but its image has 32x24; expected equal sizes"),
        (encode(Image.fromarray(labels(0).astype(np.uint16))), "has 16 bits per pixel; expected 8"),
        (encode(picture(1, SIZE)), "has colours; expected class numbers"),
        (encode(Image.fromarray(labels(0) > 0)), "has 1-bit grey; expected class numbers"),
        (
            encode(np.where(labels(0) == 1, 17, labels(0)).astype(np.uint8)),
            "has label 17; expected 0 to 2, or 255 for no",
        ),
        (encode(np.full(SIZE, 255, dtype=np.uint8)), "has no pixel with a class"),
        (encode(picture(1, SIZE), "JPEG"), "is no PNG file"),
        (encode(labels(0))[:60], "is damaged or truncated"),
    ],
)
def test_a_label_map_that_cannot_be_used_is_described_in_one_line(data, message):
    with pytest.raises(ImageError, match=message) as raised:
        decode_label_map(data, WIDTH_HEIGHT, LABEL_MAPS)
    assert "\n" not in str(raised.value)


def test_the_size_of_a_label_map_is_checked_before_it_is_decoded():
    small = encode(Image.new("L", (10, 10)))
    header = small[12:16] + (60_000).to_bytes(4, "big") * 2 + small[24:29]
    huge = small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
    with pytest.raises(ImageError, match="has more pixels than the limit of 50000000"):
        decode_label_map(huge, (60_000, 60_000), LABEL_MAPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.label_map": {"class_names": [str(n) for n in range(256)]}}, "at most 255 items"),
        ({"data.label_map": {"class_names": ["a", "b"], "ignored": 1}}, "ignored is 1, which is a class"),
        ({"data.label_map": None}, "task is segmentation, but section data.label_map is null"),
        ({"segmentation": None}, "task is segmentation, but section segmentation is null"),
        (
            {"data.profile": "pareto"},
            "data.profile is 'pareto', which task segmentation does not support; expected natural",
        ),
        ({"student.alpha": 1.0}, "student.alpha is 1.0, which task segmentation does not support; expected 0"),
        ({"task": "classification"}, "segmentation is set, but task is classification"),
    ],
)
def test_params_that_do_not_fit_the_task_are_refused(tmp_path, changes, message):
    with pytest.raises(ParamsError, match=message):
        segmentation_params(tmp_path, **{key.replace(".", "__"): value for key, value in changes.items()})


def test_split_counts_the_pixels_of_each_label_map_and_prior_sums_those_of_training(tmp_path):
    label_map_folder(tmp_path / "source")
    settings = segmentation_params(tmp_path / "source")
    made = split.run(settings, tmp_path / "split")
    assert made.sizes == {"train": 8, "validation": 2, "test": 2} and made.classes == 3
    rows = pyarrow.parquet.read_table(tmp_path / "split/train.parquet").to_pylist()
    expected = [np.bincount(labels(int(row["sample_id"][:3])).ravel(), minlength=256)[:3].tolist() for row in rows]
    assert [row["pixels"] for row in rows] == expected
    computed = prior.run(settings, tmp_path / "split", tmp_path / "prior.json")
    assert computed.counts == np.sum(expected, 0).tolist() and computed.groups == ["many", "medium", "few"]
    assert computed.p == pytest.approx(np.sum(expected, 0) / np.sum(expected))
    assert "labelled pixels" in str(computed)


def test_a_class_that_never_occurs_is_named(tmp_path):
    label_map_folder(tmp_path / "source")
    settings = segmentation_params(tmp_path / "source", data__label_map={"class_names": [*CLASSES, "tram"]})
    split.run(settings, tmp_path / "split")
    with pytest.raises(DataError, match="class 'tram' has no training samples"):
        prior.run(settings, tmp_path / "split", tmp_path / "prior.json")
    found = check(settings, tmp_path / "journal")
    assert any("class 'tram' occurs in no training label map" in line for line in found.verdict)


def test_an_image_without_a_label_map_fails_the_split_or_is_left_out(tmp_path):
    root = label_map_folder(tmp_path / "source")
    (root / "annotations/003.png").unlink()
    with pytest.raises(DataError, match=r"images/003.jpg: has no label map; expected .*annotations/003.png"):
        split.run(segmentation_params(root), tmp_path / "split")
    made = split.run(segmentation_params(root, data__on_bad_image="skip"), tmp_path / "split")
    assert made.skipped == 1 and "003.jpg,images," in (tmp_path / "split/skipped.csv").read_text()
    write(root / "annotations/lost.png", encode(labels(1)))
    with pytest.raises(DataError, match=r"annotations/lost.png: has no image in images/"):
        split.run(segmentation_params(root), tmp_path / "split")


def test_data_check_lists_pixel_shares_sizes_and_bad_label_maps(tmp_path, capsys):
    root = label_map_folder(tmp_path / "source")
    label_map_folder(root, 1, "small", (12, 14))
    write(root / "annotations/004.png", encode(np.full(SIZE, 9, dtype=np.uint8)))
    assert command(tmp_path, segmentation_params(root)) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "images/004.jpg: its label map has label 9; expected 0 to 2, or 255" in printed
    assert "2 image sizes" in printed and "of all pixels have a class" in printed
    assert "1 image is smaller than segmentation.augment.crop [24, 32]" in printed
    figures = report(tmp_path)["label_maps"]
    assert figures["images"]["train"][0] == report(tmp_path)["images"]["train"] - 1
    assert {(size["width"], size["height"]): size["images"] for size in figures["sizes"]} == {(32, 24): 11, (14, 12): 1}
    csv = (tmp_path / "report/classes.csv").read_text().splitlines()
    assert csv[0] == "class,train_pixels,validation_pixels,test_pixels,train_images,validation_images,test_images"


def test_a_split_for_classification_has_no_columns_of_label_maps(tmp_path):
    root = folder(tmp_path / "photos", {"a": 6, "b": 6})
    split.run(data_params(root), tmp_path / "split")
    names = pyarrow.parquet.read_schema(tmp_path / "split/train.parquet").names
    assert names == ["sample_id", "label", "reference", "sha256"] and params().task == "classification"
    assert json.loads((tmp_path / "split/classes.json").read_text()) == ["a", "b"]


def test_a_retraining_ingests_nothing_and_images_without_label_maps_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = segmentation_params(label_map_folder(tmp_path / "source"))
    assert ingest(params) == IngestReport()
    with pytest.raises(ParamsError, match="given: is a drop folder, but task is segmentation; add images with their"):
        ingest(params, tmp_path / "given")
    write(tmp_path / params.ingest.drop / "road/1.png", encode(picture(0)))
    with pytest.raises(ParamsError, match=r"add images with their label maps to data\.location"):
        ingest(params)


@pytest.mark.parametrize("part", ["images", "annotations"])
def test_a_link_to_a_folder_is_named(tmp_path, part):
    root = label_map_folder(tmp_path / "scenes", 4)
    (tmp_path / "more").mkdir()
    (root / part / "more").symlink_to(tmp_path / "more")
    with pytest.raises(DataError, match=f"scenes/{part}/more: is a link to a folder; put the images there"):
        open_base_source(segmentation_params(root).data)


def test_a_label_map_in_another_unicode_form_than_its_image_is_named(tmp_path):
    label_map_folder(tmp_path, 3)
    (tmp_path / "images/001.jpg").rename(tmp_path / "images/e\u0301.jpg")
    (tmp_path / "annotations/001.png").rename(tmp_path / "annotations/\u00e9.png")
    with pytest.raises(DataError, match=r"annotations/\u00e9.png: has the name of an image .* another Unicode form"):
        open_base_source(segmentation_params(tmp_path).data)


def test_class_names_of_label_maps_are_compared_and_stored_in_unicodes_composed_form(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    with pytest.raises(ValidationError, match="class_names has 'caf\u00e9' twice"):
        LabelMapParams(class_names=["road", composed, decomposed])
    root = label_map_folder(tmp_path / "scenes", 4)
    made = segmentation_params(root, data__label_map={"class_names": ["road", decomposed, "sign"]})
    assert open_base_source(made.data).classes == ["road", composed, "sign"]


def test_a_label_map_with_a_suffix_in_capitals_is_read(tmp_path):
    root = label_map_folder(tmp_path / "scenes", 4)
    before = [open_base_source(segmentation_params(root).data).read_label_map(f"images/{n:03}.jpg") for n in range(4)]
    for path in (root / "annotations").iterdir():
        path.rename(path.with_suffix(".PNG"))
    source = open_base_source(segmentation_params(root).data)
    assert [source.read_label_map(row.reference) for row in source.rows] == before


def remove_a_label_map(root):
    (root / "annotations/004.png").unlink()


def other_label_map(data):
    return lambda root: write(root / "annotations/004.png", data)


@pytest.mark.parametrize(
    ("change", "settings", "status", "printed"),
    [
        (other_label_map(encode(labels(4, (12, 14)))), {}, 1, "has 14x12 pixels, but its image has 32x24"),
        (other_label_map(palette(labels(4))), {}, 0, "missing: 0; unreadable: 0"),
        (other_label_map(encode(Image.fromarray(labels(4).astype(np.uint16)))), {}, 1, "has 16 bits per pixel; expected 8"),
        (other_label_map(encode(np.full(SIZE, 3, dtype=np.uint8))), {}, 1, "has label 3; expected 0 to 2, or 255"),
        (other_label_map(encode(np.full(SIZE, 255, dtype=np.uint8))), {}, 1, "has no pixel with a class"),
        (remove_a_label_map, {}, 1, "images/004.jpg: has no label map; expected"),
        (None, {"data__label_map": {"class_names": [*CLASSES, "tram"]}}, 1, "class 'tram' occurs in no training label map"),
        (None, {"segmentation__augment__crop": [96, 96]}, 0, "12 images are smaller than segmentation.augment.crop [96, 96]"),
    ],
    ids=["another size", "palette", "16 bit", "label beyond C", "all ignored", "no label map", "never occurs", "large crop"],
)  # fmt: skip
def test_bad_input_is_one_line_of_the_check_and_of_split(tmp_path, capsys, change, settings, status, printed):
    """C > 255 is refused with the params, above; a crop larger than the image is padded, and a palette's indexes count."""
    root = label_map_folder(tmp_path / "source")
    made = segmentation_params(root, **settings)
    if change:
        change(root)
    assert command(tmp_path, made) == status
    lines = capsys.readouterr().out
    assert printed in " ".join(lines.split())
    if status and change:
        with pytest.raises(DataError) as refused:
            split.run(made, tmp_path / "split")
        assert printed in str(refused.value) and not (tmp_path / "split").exists()
    else:
        assert split.run(made, tmp_path / "split").skipped == 0


def test_a_crop_larger_than_the_image_is_padded_with_pixels_without_a_class():
    made = torch.from_numpy(labels(2))
    augment = SegmentationAugmentParams(crop=[48, 40], ratio=[1, 1], max_share=1, flip=False, photometric=False)
    draws = draw_crops(1, augment, torch.Generator().manual_seed(0))
    views, target = apply_crops(torch.zeros(1, 3, *SIZE, dtype=torch.uint8), made[None], draws, augment)
    assert views.shape == (1, 1, 3, 48, 40) and target.shape == (1, 48, 40)
    assert torch.equal(target[0, : SIZE[0], : SIZE[1]], made)
    assert (target[0, SIZE[0] :] == 255).all() and (target[0, :, SIZE[1] :] == 255).all()
