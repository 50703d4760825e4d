"""Stage `prior`: counts of the training split alone, and what a class without samples means."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from making import params

from pipeline import prior
from pipeline.errors import DataError, ParamsError
from pipeline.prior import load_prior


@pytest.fixture
def split(tmp_path):
    def write(labels, classes):
        folder = tmp_path / "split"
        folder.mkdir()
        (folder / "classes.json").write_text(json.dumps(classes))
        pyarrow.parquet.write_table(pa.table({"label": pa.array(labels, pa.int32())}), folder / "train.parquet")
        return folder

    return write


def test_counts_priors_and_groups_are_written_and_read_back(split, tmp_path):
    labels = [0] * 150 + [1] * 30 + [2] * 20
    made = prior.run(params(), split(labels, ["a", "b", "c"]), tmp_path / "prior.json")
    assert made.counts == [150, 30, 20] and made.groups == ["many", "medium", "medium"]
    assert made.p == pytest.approx([0.75, 0.15, 0.1], abs=1e-15)
    assert made.log_prior == pytest.approx([math.log(0.75), math.log(0.15), math.log(0.1)], abs=1e-15)
    assert load_prior(tmp_path / "prior.json") == made
    assert "3 classes of 150 to 20 samples (1 many, 2 medium, 0 few)" in str(made)


def test_a_class_without_training_samples_is_named_with_the_ways_out(split, tmp_path):
    folder = split([0, 0, 2], ["a", "b", "c", "d"])
    with pytest.raises(
        DataError, match=r"class 'b' has no training samples \(2 such classes\).*prior.smoothing above 0"
    ):
        prior.run(params(), folder, tmp_path / "prior.json")
    assert not (tmp_path / "prior.json").exists()


def test_smoothing_lets_a_class_without_samples_through(split, tmp_path):
    folder = split([0, 0, 2], ["a", "b", "c"])
    made = prior.run(params({"prior.smoothing": 1.0}), folder, tmp_path / "prior.json")
    assert made.p == pytest.approx([3 / 6, 1 / 6, 2 / 6]) and np.isfinite(made.log_prior).all()


def test_a_prior_that_was_never_made_names_the_stage(tmp_path):
    with pytest.raises(ParamsError, match=r"prior.json: No such file or directory; run `dvc repro prior` first"):
        load_prior(tmp_path / "prior.json")
