"""Stage `prior`: counts of the training split only, and classes without samples."""

import json
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from models.class_sampler import ClassSampler
from pipeline import prior
from pipeline.data.class_prior import load_prior
from pipeline.shared.errors import DataError, ParamsError, StageError
from tests.support.making import ROOT, params


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


def test_a_class_without_training_samples_is_named_with_the_remedies(split, tmp_path):
    folder = split([0, 0, 2], ["a", "b", "c", "d"])
    with pytest.raises(
        DataError, match=r"class 'b' has no training samples \(such classes: 2\).*prior.smoothing above 0"
    ):
        prior.run(params(), folder, tmp_path / "prior.json")
    assert not (tmp_path / "prior.json").exists()


def test_smoothing_lets_a_class_without_samples_through(split, tmp_path):
    folder = split([0, 0, 2], ["a", "b", "c"])
    made = prior.run(params({"prior.smoothing": 1.0}), folder, tmp_path / "prior.json")
    assert made.p == pytest.approx([3 / 6, 1 / 6, 2 / 6]) and np.isfinite(made.log_prior).all()


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_the_prior_of_a_sampling_is_that_of_the_drawn_classes(split, tmp_path, power):
    labels = [0] * 90 + [1] * 30 + [2] * 7
    made = prior.run(params(), split(labels, ["a", "b", "c"]), tmp_path / "prior.json")
    shares = ClassSampler(torch.tensor(labels), 3, power).shares.numpy()
    assert np.exp(made.sampled(power).in_losses) == pytest.approx(shares, rel=1e-12)
    assert made.sampled(power).log_prior == made.log_prior and made.sampled(1.0) is made


def test_a_class_without_samples_keeps_its_smoothed_share_when_classes_are_sampled(split, tmp_path):
    made = prior.run(
        params({"prior.smoothing": 0.5}), split([0] * 8 + [2] * 2, ["a", "b", "c"]), tmp_path / "prior.json"
    )
    roots = np.sqrt([8.5, 0.5, 2.5])
    assert np.exp(made.sampled(0.5).in_losses) == pytest.approx(roots / roots.sum(), rel=1e-12)
    # The prior of a power near 1 is near that of power 1: an empty class does not jump.
    assert made.sampled(1 - 1e-9).in_losses == pytest.approx(made.in_losses, abs=1e-6)


def test_a_prior_that_was_never_made_names_the_stage(tmp_path):
    with pytest.raises(ParamsError, match=r"prior.json: No such file or directory; run `dvc repro prior` first"):
        load_prior(tmp_path / "prior.json")


def test_the_effective_number_changes_the_prior_of_the_losses_and_nothing_else(split, tmp_path):
    folder = split([0] * 150 + [1] * 30 + [2] * 20, ["a", "b", "c"])
    plain = prior.run(params(), folder, tmp_path / "plain.json")
    made = prior.run(
        params({"prior.weighting": "effective_number", "prior.beta": 0.99}), folder, tmp_path / "prior.json"
    )
    assert (made.counts, made.p, made.groups) == (plain.counts, plain.p, plain.groups)
    weights = [sum(0.99**k for k in range(n)) for n in (150, 30, 20)]
    assert made.log_prior == plain.log_prior == plain.in_losses
    assert made.in_losses == pytest.approx([math.log(w / sum(weights)) for w in weights], abs=1e-12)
    assert load_prior(tmp_path / "prior.json") == made


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], "train.parquet: has label 3; expected 0 to 2"),
        ([0, -1, 1], "train.parquet: has label -1; expected 0 to 2"),
        ([0, None, 1], "train.parquet: column 'label' has 1 row without a label"),
    ],
)
def test_an_invalid_label_is_named(split, tmp_path, labels, message):
    with pytest.raises(DataError) as caught:
        prior.run(params(), split(labels, ["a", "b", "c"]), tmp_path / "prior.json")
    assert str(caught.value).endswith(message)


def test_a_damaged_or_missing_table_raises_an_error_with_the_stage_to_run(split, tmp_path):
    folder = split([0, 1, 2], ["a", "b", "c"])
    data = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(data[:-9])
    with pytest.raises(StageError, match=r"train.parquet: damaged \(.*\); run `dvc repro -f split`"):
        prior.run(params(), folder, tmp_path / "prior.json")
    (folder / "train.parquet").unlink()
    with pytest.raises(ParamsError, match=r"train.parquet: no such file; run `dvc repro split` first"):
        prior.run(params(), folder, tmp_path / "prior.json")


COUNTING = """
import sys
from pathlib import Path
import numpy as np
from pipeline.prior import count_labels
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
few, many = (count_labels(Path(path), 10**6) for path in sys.argv[1:3] if not print(peak()))
print(peak())
np.save(sys.argv[3], many)
"""


@pytest.mark.slow
def test_ten_million_labels_of_a_million_classes_are_counted_in_memory_that_rows_do_not_add_to(tmp_path):
    labels = np.exp(np.random.default_rng(0).random(10_000_000) * math.log(10**6)).astype(np.int32) - 1
    for name, size in (("few", 2_500_000), ("many", len(labels))):
        pyarrow.parquet.write_table(pa.table({"label": labels[:size]}), tmp_path / f"{name}.parquet")
    paths = [str(tmp_path / name) for name in ("few.parquet", "many.parquet", "counts.npy")]
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, after_few, after_many = map(float, done.stdout.split())
    # The additional 7.5 million labels are 30 MB in the file and 60 MB as int64.
    assert after_many - after_few < 25
    assert after_few > before
    expected = np.zeros(10**6, dtype=np.int64)
    np.add.at(expected, labels, 1)
    assert np.array_equal(np.load(tmp_path / "counts.npy"), expected)
