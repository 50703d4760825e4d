"""Minimum number of test images: the rule against simulation and hand calculation, and for unequal class counts."""

from __future__ import annotations

import numpy as np
import pytest

from models.calibration import fit_calibration
from models.sample_size import ENOUGH, as_json, from_json, sample_size, sample_sizes, warnings_of


@pytest.mark.parametrize("tested", [[40] * 10, [50, 20, 5, 1], [3, 0, 9], [1]])
def test_the_mean_over_classes_varies_like_the_share_of_that_many_images(tested: list[int]) -> None:
    counts = np.array(tested)[np.array(tested) > 0]
    right = np.random.default_rng(0).binomial(counts, 0.5, (200_000, len(counts)))
    assert sample_size(tested).effective == pytest.approx(0.25 / (right / counts).mean(axis=1).var(), rel=0.02)
    assert sample_size(tested).images == sum(tested)


def test_a_mean_with_weights_varies_like_the_share_of_that_many_images() -> None:
    counts, weights = np.array([50, 20, 5]), np.array([0.7, 0.2, 0.1])
    right = np.random.default_rng(0).binomial(counts, 0.5, (200_000, 3))
    expected = 0.25 / (right / counts @ weights).var()
    assert sample_size([50, 20, 0, 5], [7, 2, 9, 1]).effective == pytest.approx(expected, rel=0.02)


def test_with_enough_images_every_interval_is_within_ten_points() -> None:
    assert not sample_size([10] * 10).too_few and sample_size([10] * 9 + [9]).too_few
    assert sample_size([ENOUGH]).half_width == pytest.approx(0.098)


def test_the_embedded_digits_are_enough_over_all_classes() -> None:
    assert not sample_sizes([40] * 10, ["many"] * 5 + ["few"] * 5)["all"].too_few


def test_groups_without_classes_are_excluded_and_a_group_without_test_images_is_named() -> None:
    sizes = sample_sizes([500, 7, 0], ["many", "medium", "few"])
    assert list(sizes) == ["all", "many", "medium", "few"] and list(sample_sizes([500], ["many"])) == ["all", "many"]
    messages = warnings_of(sizes)
    assert [line.partition(":")[0] for line in messages] == ["all", "medium", "few"]
    assert messages[1] == "medium: 7 test images, fewer than 100: figures are uncertain by up to ±37 percentage points"
    assert messages[2] == "few: no test images, so no accuracy can be measured"
    assert from_json(as_json(sizes)) == sizes


def test_a_calibration_of_unequal_counts_is_that_of_each_class_repeated_to_the_same_size() -> None:
    random = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    logits = random.normal(size=(100, 3)) + 2 * np.eye(3)[labels] + [0.7, 0, -0.3]
    repeated = np.repeat(np.arange(100), np.repeat([1, 2, 6], [60, 30, 10]))
    actual, expected = fit_calibration(logits, labels), fit_calibration(logits[repeated], labels[repeated])
    assert actual.temperature == pytest.approx(expected.temperature, rel=1e-6)
    assert actual.bias == pytest.approx(expected.bias, abs=1e-6)
    assert actual.size is not None and actual.size.images == 100 and actual.size.effective == pytest.approx(60)
