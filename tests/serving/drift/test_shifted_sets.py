"""Drift on five standard shifted test sets of real scans and photographs: from the log to the estimate and its use."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from conftest import Release
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from models.calibration import Calibration, calibrate, fit_calibration
from models.label_shift import total_variation
from models.prior import adjust_logits, log_target_prior, softmax
from pipeline.evaluation.shifted_priors import SETS, shifted_prior, shifted_rows
from serving.drift.estimate import estimate_drift
from serving.drift.logged_logits import read_logits
from serving.repository.manifest import Manifest
from tests.support.logit_logs import write_log

PACKS = Path(os.environ.get("TAILOR_IMAGE_PACKS", Path(__file__).parents[4] / "shared/data"))
COUNTS = [int(400 * 25 ** (-c / 9)) for c in range(10)]  # 400 to 16
PHOTOGRAPHS = pytest.param("photographs", marks=[pytest.mark.slow, pytest.mark.xdist_group("shifted photographs")])


@dataclass(frozen=True)
class Student:
    """A classifier of a long-tailed training set with a weighted loss: its logits are for the balanced prior."""

    logits: np.ndarray
    labels: np.ndarray
    counts: list[int]
    calibration: Calibration


def trained(features: np.ndarray, labels: np.ndarray, counts: list[int], held: int) -> Student:
    """Train on `counts` images per class, calibrate on `held` others, use the rest as test set."""
    order = np.random.default_rng(1).permutation(len(labels))
    features, labels = features[order], labels[order]
    tail = np.concatenate([np.flatnonzero(labels == c)[:count] for c, count in enumerate(counts)])
    model = LogisticRegression(class_weight="balanced", max_iter=1000, C=0.1).fit(features[tail], labels[tail])
    rest = np.random.default_rng(2).permutation(np.setdiff1d(np.arange(len(labels)), tail))
    logits = model.decision_function(features[rest])
    calibration = fit_calibration(logits[:held], labels[rest][:held])
    return Student(logits[held:], labels[rest][held:], counts, calibration)


@pytest.fixture(scope="module")
def digits() -> Student:
    scans = load_digits()
    return trained(scans.data / 16, scans.target, [max(3, count // 6) for count in COUNTS], 400)


@pytest.fixture(scope="module")
def photographs() -> Student:
    pack = PACKS / "cifar10-test.parquet"
    if not pack.is_file():
        pytest.skip(f"{pack} is not there")
    table = pyarrow.parquet.ParquetFile(pack).read(["image", "label"])
    chosen = np.random.default_rng(0).permutation(len(table))[:6000]
    images = [Image.open(io.BytesIO(table["image"][int(row)].as_py())).convert("RGB") for row in chosen]
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255
    return trained(edges_and_colours(pixels), table["label"].to_numpy()[chosen], COUNTS, 1500)


def edges_and_colours(pixels: np.ndarray) -> np.ndarray:
    """Compute gradient histograms in 4 x 4 cells and mean colours in 8 x 8: [N,32,32,3] to [N,560]."""
    down, across = np.gradient(pixels.mean(3), axis=(1, 2))
    strength, turn = np.hypot(across, down), (np.arctan2(down, across) / (2 * np.pi) % 1) * 8
    bins = np.stack([strength * (turn.astype(int) % 8 == angle) for angle in range(8)], 1)
    cells = bins.reshape(len(pixels), 8, 8, 4, 8, 4).sum((3, 5))
    cells /= np.sqrt((cells**2).sum(1, keepdims=True)) + 0.1
    colours = pixels.reshape(len(pixels), 4, 8, 4, 8, 3).mean((2, 4))
    return np.concatenate([cells.reshape(len(pixels), -1), colours.reshape(len(pixels), -1)], 1)


def described(release: Release, counts: list[int]) -> Manifest:
    """Return the manifest of a release with ten classes."""
    names = [str(c) for c in range(10)]
    return release.manifest.model_copy(update={"classes": names, "counts": counts})


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["digits", PHOTOGRAPHS])
def test_a_shifted_set_is_found_in_the_log_as_quapys_em_finds_it_and_its_distance_lies_in_the_interval(
    kind: str,
    name: str,
    release: Release,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from quapy.method.aggregative import EMQ

    student: Student = request.getfixturevalue(kind)
    truth = shifted_prior(student.counts, SETS[name])
    rows = shifted_rows(student.labels, truth, np.random.default_rng(0))
    manifest = described(release, student.counts)
    write_log(tmp_path, manifest, student.logits[rows])
    logged = read_logits(tmp_path, manifest)
    found = estimate_drift(logged.logits, student.counts, student.calibration, confidence=0.99)
    monkeypatch.setattr(EMQ, "MAX_ITER", 20_000)
    answered = softmax(calibrate(logged.logits, student.calibration))
    theirs, _ = EMQ.EM(np.full(10, 0.1), answered, epsilon=1e-7)
    # The likelihood is flat for similar classes: the reference may stop at another prior, but not at a likelier one.
    assert np.log(answered @ found.em).sum() > np.log(answered @ theirs).sum() - 1e-3
    assert np.abs(found.em - theirs).max() < {"digits": 1e-3, "photographs": 0.01}[kind]
    assert found.distance.low <= total_variation(truth, found.training) <= found.distance.high
    counted = np.bincount(logged.logits.argmax(1), minlength=10) / len(rows)
    # This student of photographs is correct for one in three, and the forward sets have 300 images.
    assert total_variation(found.prior, truth) < {"digits": 0.1, "photographs": 0.25}[kind]
    if not name.startswith("forward"):  # counting predictions wins where errors fall on frequent classes
        assert total_variation(found.prior, truth) < total_variation(counted, truth)
    if name.endswith("50"):
        # The estimate improves accuracy over the balanced prior, without labels.
        labels, adjusted = student.labels[rows], calibrate(logged.logits, student.calibration)
        right = (adjust_logits(adjusted, log_target_prior(found.prior), 1.0).argmax(1) == labels).mean()
        assert right > (adjusted.argmax(1) == labels).mean()
