"""Reading logged logits, estimating the live class prior with intervals, calibration."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, COUNTS, Release

from models.label_shift import estimate_prior, total_variation
from serving.drift import estimate as estimates
from serving.drift.calibration import calibration_from
from serving.drift.estimate import estimate_drift
from serving.drift.logged_logits import parse_time, read_logits
from serving.shared.errors import InputError, ServingError
from serving.triton.storage.logit_log import log_files
from tests.support.drift_data import LIVE, TRAINING, damage, drawn, write_predictions
from tests.support.logit_logs import write_log


@pytest.fixture
def logged(release: Release, tmp_path: Path) -> Path:
    """A log of 2,000 predictions under LIVE."""
    write_log(tmp_path / "logits", release.manifest, drawn(LIVE, 2000)[1])
    return tmp_path / "logits"


def test_logged_logits_are_read_back_or_sampled_uniformly_above_the_limit(logged: Path, release: Release) -> None:
    expected = drawn(LIVE, 2000)[1].astype(np.float32)
    whole = read_logits(logged, release.manifest)
    np.testing.assert_array_equal(whole.logits, expected)
    assert (whole.in_window, whole.others, whole.skipped) == (2000, {}, {})
    write_log(logged, release.manifest, expected + 100)
    part, again, other = (read_logits(logged, release.manifest, most=300, seed=seed) for seed in (0, 0, 1))
    assert part.in_window == 4000
    assert part.logits.shape == (300, 5)
    np.testing.assert_array_equal(part.logits, again.logits)
    assert not np.array_equal(part.logits, other.logits)
    assert 100 < (part.logits.max(1) > 70).sum() < 200  # about half from either part


def test_window_of_time_is_half_open_and_moments_are_read(logged: Path, release: Release) -> None:
    times = read_logits(logged, release.manifest).times / 1000
    first, last = float(times.min()), float(times.max())
    assert read_logits(logged, release.manifest, since=first, until=last + 0.001).in_window == 2000
    assert read_logits(logged, release.manifest, since=last + 0.001).in_window == 0
    assert read_logits(logged, release.manifest, until=first).in_window == 0
    assert parse_time("90m", "--since", now=10_000) == 4600
    assert parse_time("2d", "--since", now=0) == -172_800
    assert parse_time("2026-11-24T10:00+00:00", "--since") == 1_795_514_400
    for text in ("1x", "yesterday", "", "1e3h", "9" * 40 + "h"):
        with pytest.raises(InputError, match=r"--until is .*; expected a time such as 24h, 7d or 2026-11-24T10:00"):
            parse_time(text, "--until")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        *((kind, "is damaged") for kind in ("truncated", "empty", "garbage", "no footer", "nan", "null")),
        *((kind, "is damaged") for kind in ("missing column", "more columns", "another width", "null time")),
        ("foreign", "is no log of logits of format 1"),
        ("another format", "is no log of logits of format 1"),
        ("other classes", "is of other classes than version 1"),
    ],
)
def test_unusable_file_is_skipped_by_name_and_the_others_are_read(
    logged: Path, release: Release, kind: str, said: str
) -> None:
    write_log(logged, release.manifest, drawn(LIVE, 150)[1])
    path = log_files(logged)[-1]
    damage(path, kind)
    (logged / "notes.txt").write_text("not of the log, and passed over")
    logged_logits = read_logits(logged, release.manifest)
    assert list(logged_logits.skipped) == [path.name]
    assert logged_logits.skipped[path.name].startswith(said) and "\n" not in logged_logits.skipped[path.name]
    assert logged_logits.in_window == 2000


def test_images_of_another_release_are_counted_separately_by_version(logged: Path, release: Release) -> None:
    write_log(logged, release.manifest, drawn(LIVE, 150)[1], student_sha256="another", version="1")
    logged_logits = read_logits(logged, release.manifest)
    assert (logged_logits.in_window, logged_logits.others) == (2000, {1: 150})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["map", "em"])
@pytest.mark.parametrize("shift", ["none", "uniform", "backward"])
def test_interval_coverage_matches_the_confidence_level(method: str, shift: str) -> None:
    truth = {"none": TRAINING, "uniform": np.full(5, 0.2), "backward": TRAINING[::-1]}[shift]
    apart = float(total_variation(truth, TRAINING))
    classes, distances = [], []
    for seed in range(60):
        estimate = estimate_drift(drawn(truth, 300, seed)[1], COUNTS, method=method, resamples=100, seed=seed)
        classes.append((estimate.low <= truth) & (truth <= estimate.high))
        distances.append(estimate.distance.low <= apart <= estimate.distance.high)
    # Rare classes are near 0, where the bootstrap under-covers slightly; the interval of the distance is conservative.
    assert np.mean(classes) > 0.85
    assert np.mean(distances) > 0.95 - 4 * (0.95 * 0.05 / 60) ** 0.5


def test_noise_alone_is_not_reported_as_drift() -> None:
    alarms = [estimate_drift(drawn(TRAINING, 150, seed)[1], COUNTS, resamples=100).exceeds(0.02) for seed in range(40)]
    assert sum(alarms) <= 2
    assert estimate_drift(drawn(LIVE, 150)[1], COUNTS).exceeds(0.3)


@pytest.mark.parametrize("method", ["map", "em"])
def test_few_images_of_many_classes_are_no_drift_although_they_miss_most_of_them(method: str) -> None:
    counts = np.maximum(1, 1000 * 0.001 ** (np.arange(1000) / 999)).astype(int)
    lows = []
    for seed in range(8):
        labels = np.random.default_rng(1000 + seed).choice(1000, 100, p=counts / counts.sum())
        estimate = estimate_drift(12 * np.eye(1000)[labels], counts.tolist(), method=method, resamples=20, seed=seed)
        assert estimate.distance.value > 0.3
        lows.append(estimate.distance.low)
    assert sum(low > 0.1 for low in lows) <= 1


def test_map_gives_every_class_a_share_and_stays_near_training_with_few_images() -> None:
    logits = np.log(np.eye(5)[[4] * 10] + 1e-9)
    em, little, much = (
        estimate_drift(logits, COUNTS, method=method, pseudo_samples=pseudo)
        for method, pseudo in (("em", None), ("map", None), ("map", 1000))
    )
    assert em.prior[0] < 1e-6 < little.prior.min()
    assert em.distance.value > little.distance.value > much.distance.value
    assert much.distance.value < 0.02
    np.testing.assert_allclose(little.em, em.prior)


def test_groups_add_up_to_the_classes_and_the_most_shifted_come_first() -> None:
    estimate = estimate_drift(drawn(LIVE, 500)[1], COUNTS)
    assert list(estimate.groups) == ["many", "medium", "few"]
    assert sum(share.value for share in estimate.groups.values()) == pytest.approx(1)
    assert estimate.groups["few"].value == pytest.approx(estimate.prior[4])
    changes = np.abs(estimate.prior - estimate.training)[estimate.most_shifted(5)]
    assert (np.diff(changes) <= 0).all()
    assert all(share.low <= share.value <= share.high for share in estimate.groups.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "bbse"}, "method is 'bbse'; expected em or map"),
        ({"pseudo_samples": -1}, "pseudo-samples are -1; expected a number of at least 0"),
        ({"pseudo_samples": np.nan}, "pseudo-samples are nan"),
        ({"confidence": 1.0}, "confidence is 1.0; expected a number between 0 and 1"),
        ({"resamples": 1}, "resamples is 1"),
    ],
)
def test_unusable_argument_of_an_estimate_is_named(arguments: dict, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        estimate_drift(drawn(LIVE, 100)[1], COUNTS, **arguments)


@pytest.mark.parametrize("method", ["em", "map"])
def test_an_estimate_that_has_not_converged_is_an_error_with_advice(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both methods are computed for the output, so another method is no advice."""
    monkeypatch.setattr(estimates, "estimate_prior", partial(estimate_prior, max_iterations=1))
    with pytest.raises(ServingError, match=r"has not converged on 100 images; give more of them, or change --samples$"):
        estimate_drift(drawn(LIVE, 100)[1], COUNTS, method=method)


def test_overconfident_logits_are_calibrated_with_the_test_predictions(release: Release, tmp_path: Path) -> None:
    manifest = write_predictions(tmp_path / "predictions.parquet", release.manifest, 3.0)
    calibration = calibration_from(tmp_path / "predictions.parquet", manifest)
    assert calibration.temperature == pytest.approx(3, rel=0.15)
    logits = 3 * drawn(LIVE, 3000)[1]
    plain, better = (estimate_drift(logits, COUNTS, given, resamples=20) for given in (None, calibration))
    assert total_variation(better.prior, LIVE) < total_variation(plain.prior, LIVE)
    assert better.low[0] <= LIVE[0] <= better.high[0]


def test_calibration_rejects_test_predictions_of_another_student(release: Release, tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    with pytest.raises(ServingError, match="no such file; run `dvc repro evaluate`, or give --calibration"):
        calibration_from(path, release.manifest)
    manifest = write_predictions(path, release.manifest)
    with pytest.raises(ServingError, match="is of another student than version 1"):
        calibration_from(path, release.manifest)
    more = manifest.model_copy(update={"classes": [*CLASSES, "fox"]})
    with pytest.raises(ServingError, match="is not of the 6 classes of version 1"):
        calibration_from(path, more)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ServingError, match=r"predictions\.parquet: damaged"):
        calibration_from(path, manifest)
