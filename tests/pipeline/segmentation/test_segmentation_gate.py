"""The promotion gate of task segmentation: mIoU of the same images, paired intervals, the floor of the first model."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from models.prior import pixel_groups
from models.segmentation.metrics import Areas
from pipeline.evaluation.gate import decide
from pipeline.evaluation.predictions import Contender
from pipeline.params import GateParams
from pipeline.segmentation.run_areas import PARTS, load_areas

IMAGES, CLASSES, SIDE = 120, 4, 12


@pytest.fixture(scope="module")
def truth():
    generator = np.random.default_rng(0)
    return generator.choice(CLASSES, (IMAGES, SIDE, SIDE), p=[0.6, 0.25, 0.1, 0.05])


def predicted(truth, error, seed=1):
    generator = np.random.default_rng(seed)
    wrong = generator.random(truth.shape) < error
    return np.where(wrong, generator.integers(0, CLASSES, truth.shape), truth)


@pytest.fixture
def run(tmp_path, truth):
    def made(name, prediction, labels=truth, rows=None):
        folder = tmp_path / name
        folder.mkdir()
        columns = {"sample_id": [f"{n:03d}" for n in range(IMAGES)]}
        images = [Areas.zero(CLASSES) for _ in range(IMAGES)]
        for areas, own, right in zip(images, prediction, labels, strict=True):
            areas.add(own, right)
        for part in PARTS:
            columns[f"{part}_balanced"] = [getattr(areas, part).tolist() for areas in images]
        pyarrow.parquet.write_table(pa.table(columns).take(rows or list(range(IMAGES))), folder / "predictions.parquet")
        counts = np.bincount(labels.ravel(), minlength=CLASSES)
        prior = {
            "classes": list("abcd"), "counts": counts.tolist(), "p": (counts / counts.sum()).tolist(),
            "log_prior": np.log(counts / counts.sum()).tolist(), "groups": pixel_groups(counts),
        }  # fmt: skip
        (folder / "prior.json").write_text(json.dumps(prior))
        return Contender(folder / "predictions.parquet", folder / "prior.json")

    return made


def test_the_measures_are_those_of_summed_areas(run, truth):
    runs = {error: predicted(truth, error) for error in (0.1, 0.3)}
    better, worse = run("better", runs[0.1]), run("worse", runs[0.3], rows=list(range(IMAGES))[::-1])
    decision = decide(better, worse, GateParams(), 15, None)
    expected = {}
    for error, prediction in runs.items():
        areas = Areas.zero(CLASSES)
        areas.add(prediction, truth)
        expected[error] = areas.metrics(pixel_groups(np.bincount(truth.ravel())))
    everything = decision.measures["all"]
    assert everything.challenger == pytest.approx(expected[0.1]["miou"])
    assert everything.champion == pytest.approx(expected[0.3]["miou"])
    assert decision.measures["few"].champion == pytest.approx(expected[0.3]["miou_few"])
    assert 0 < everything.low < everything.difference < everything.high
    assert decision.promote and decision.computed and decision.samples == IMAGES


def test_a_challenger_that_is_worse_beyond_noise_is_refused(run, truth):
    champion, challenger = run("before", predicted(truth, 0.1)), run("after", predicted(truth, 0.3))
    decision = decide(challenger, champion, GateParams(), 15, None)
    assert not decision.promote and decision.computed and decision.reasons[0].startswith("all 0.")


def test_the_first_model_must_reach_the_floor(run, truth):
    contender = run("first", predicted(truth, 0.2))
    assert str(decide(contender, None, GateParams(floor=0.3), 15, None)).startswith("promote: first model, mIoU ")
    assert decide(contender, None, GateParams(floor=0.95), 15, None).verdict == "refuse"


def test_runs_on_other_label_maps_cannot_be_compared(run, truth):
    other = truth.copy()
    other[0, 0] = 3 - other[0, 0]
    decision = decide(
        run("a", predicted(truth, 0.2)), run("b", predicted(other, 0.2), labels=other), GateParams(), 15, None
    )
    assert not decision.computed and "tested on different images or label maps" in decision.reasons[0]


def test_areas_of_another_number_of_classes_are_refused_by_name(run, truth):
    contender = run("a", predicted(truth, 0.2))
    prior = json.loads(contender.prior.read_text())
    contender.prior.write_text(json.dumps({name: values[:3] for name, values in prior.items()}))
    with pytest.raises(Exception, match=r"predictions.parquet: areas have shape \[3, 120, 4\]"):
        load_areas(contender.predictions, contender.prior, "balanced")
