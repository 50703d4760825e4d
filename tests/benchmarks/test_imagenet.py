"""benchmarks.imagenet: the ImageNet recipe from photograph-sized JPEG files to a trained student, on generated data."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import yaml
from PIL import Image

import pipeline.evaluate
import pipeline.prior
import pipeline.split
import pipeline.student
import pipeline.teacher
from benchmarks import made_imagenet
from pipeline.data.published import PUBLISHED
from pipeline.params import parse_params
from pipeline.params.recipe import apply_recipe
from tests.support.project import ROOT

PUBLISHED_SHAPE = PUBLISHED["imagenet_lt"]


def test_the_whole_data_set_has_the_published_counts():
    counts = made_imagenet.class_counts(1000, 1.0)
    train = counts["train"]
    assert train[0] == 1280 and train[-1] == 5 and train == sorted(train, reverse=True)
    assert sum(train) == pytest.approx(PUBLISHED_SHAPE.images["train"], rel=0.001)
    groups = [sum(count > 100 for count in train), sum(20 <= count <= 100 for count in train)]
    assert groups == [PUBLISHED_SHAPE.groups["many"], PUBLISHED_SHAPE.groups["medium"]]
    assert sum(counts["validation"]) == 20_000 and sum(counts["test"]) == 50_000


def test_images_have_the_size_of_photographs_and_are_deterministic(tmp_path):
    for name in ("one", "other"):
        made_imagenet.make(tmp_path / name, classes=2, scale=0.002)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.JPEG"))
    assert len(files) == 8
    for path in files:
        data = (tmp_path / "one" / path).read_bytes()
        assert data == (tmp_path / "other" / path).read_bytes()
        image = Image.open(io.BytesIO(data))
        assert image.format == "JPEG" and image.size == (500, 375)
        assert 50_000 < len(data) < 200_000
    assert len({(tmp_path / "one" / path).read_bytes() for path in files}) == len(files)


def test_pictures_come_from_the_pack_of_the_command_line(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(stream, "PNG")
    pq.write_table(pa.table({"image": [stream.getvalue()]}), tmp_path / "pack.parquet")
    made_imagenet.make(tmp_path / "made", classes=2, scale=0.001, pack=tmp_path / "pack.parquet", size=(40, 30))
    image = np.asarray(Image.open(next((tmp_path / "made").rglob("*.JPEG"))))
    assert image.shape == (30, 40, 3) and image.std((0, 1)).max() < 20  # one plain colour with noise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "500"], "expected WIDTHxHEIGHT"),
        (["--scale", "0"], "expected --scale above 0"),
        (["--classes", "1"], "--classes of at least 2"),
        (["--pack", "none"], "none is not a file"),
    ],
)
def test_an_invalid_option_is_a_usage_error(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        made_imagenet.main([str(tmp_path / "made"), *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.end_to_end
def test_the_imagenet_recipe_trains_one_epoch_and_evaluates(tmp_path, monkeypatch):
    sizes = made_imagenet.make(tmp_path / "imagenet", classes=10, scale=0.02)
    assert sizes["train"] == 43
    overlay = tmp_path / "small.yaml"
    small = {"epochs": 1, "batch_size": 8, "accumulate": 2}
    overlay.write_text(
        yaml.safe_dump(
            {
                "extends": str(ROOT / "recipes/imagenet-lt-90.yaml"),
                "data": {"location": str(tmp_path / "imagenet")},
                "image": {"size": 64, "resize_to": 72},
                "engine": {"checkpoint_activations": True},
                "teacher": {"backbone": "torchvision/resnet18", **small},
                "student": {"backbone": "timm/resnet10t", **small, "queue_total": 128, "projection_dim": 32},
            }
        )
    )
    params = parse_params(yaml.safe_load(apply_recipe([overlay], ROOT / "params.yaml")[0]), overlay)
    monkeypatch.chdir(tmp_path)
    split = pipeline.split.run(params)
    assert split.sizes == {name: sizes[name] for name in ("train", "validation", "test")}
    prior = pipeline.prior.run(params)
    assert prior.counts[0] == 26 and prior.counts[-1] == 1
    pipeline.teacher.run(params)
    result = pipeline.student.run(params)
    assert {"classification", "gml", "tau", "queue_fill", "validation_accuracy"} <= set(result.last)
    assert np.isfinite(result.last["loss"]) and result.last["queue_fill"] > 0.3
    pipeline.evaluate.run(params)
    metrics = json.loads((tmp_path / "artifacts/evaluation/metrics.json").read_text())
    assert metrics
