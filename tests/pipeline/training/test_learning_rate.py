"""Learning rate schedules: known values by epoch."""

import math

import pytest

from pipeline.params import LearningRateParams
from pipeline.training.optimiser import learning_rate, polynomial_rate


def rates(base, epochs, **schedule):
    made = LearningRateParams(**{"warmup_epochs": 0, **schedule})
    return [learning_rate(made, base, epoch, epochs) for epoch in range(epochs)]


def test_cosine_over_90_epochs_starts_just_below_the_base_and_ends_just_above_zero():
    actual = rates(0.05, 90, kind="cosine")
    assert actual[0] == pytest.approx(0.04999, abs=6e-6) and actual[-1] == pytest.approx(1.49e-5, abs=5e-8)
    assert actual == sorted(actual, reverse=True)
    # Half a cosine wave is point-symmetric: the rates of an epoch and its mirror image add up to the base rate.
    assert [a + b for a, b in zip(actual, reversed(actual), strict=True)] == pytest.approx([0.05] * 90, rel=1e-12)
    assert rates(0.05, 91, kind="cosine")[45] == pytest.approx(0.025, rel=1e-12)


def test_warm_up_rises_in_equal_steps_to_the_base_before_the_cosine():
    actual = rates(0.1, 10, kind="cosine", warmup_epochs=4)
    assert actual[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert actual[4:] == rates(0.1, 10, kind="cosine")[4:]


def test_steps_fall_from_their_milestones_on():
    actual = rates(0.1, 200, kind="steps", warmup_epochs=5, milestones=[160, 180])
    assert actual[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert actual[159] == 0.1 and actual[160] == pytest.approx(0.01) and actual[179] == pytest.approx(0.01)
    assert actual[180] == pytest.approx(0.001) and actual[199] == pytest.approx(0.001)
    assert rates(1.0, 4, kind="steps", milestones=[2], factor=0.5) == [1, 1, 0.5, 0.5]


@pytest.mark.parametrize("kind", ["cosine", "steps"])
def test_a_run_of_one_epoch_has_a_rate(kind):
    (rate,) = rates(0.1, 1, kind=kind)
    assert 0 < rate <= 0.1 and math.isfinite(rate)


@pytest.mark.parametrize("m", [1, 2])
def test_the_official_rule_overshoots_after_warm_up_and_drops_an_epoch_later(m):
    # The official CIFAR script multiplies epochs, warm-up and milestones by m.
    shape = {"kind": "steps", "warmup_epochs": 5 * m, "milestones": [160 * m, 180 * m]}
    official, paper = rates(0.1, 200 * m, rule="official", **shape), rates(0.1, 200 * m, rule="paper", **shape)
    assert official[5 * m] == pytest.approx({1: 0.12, 2: 0.11}[m]) and paper[5 * m] == 0.1
    assert official[5 * m + 1] == 0.1 and max(paper) == 0.1
    first, second = {1: (161, 181), 2: (321, 361)}[m]
    assert official[first - 1 : first + 1] == pytest.approx([0.1, 0.01])
    assert official[second - 1 : second + 1] == pytest.approx([0.01, 0.001])
    differing = [epoch for epoch, pair in enumerate(zip(official, paper, strict=True)) if pair[0] != pair[1]]
    assert differing == [5 * m, 160 * m, 180 * m]


def test_the_rules_agree_where_there_is_neither_warm_up_nor_milestone():
    assert rates(0.05, 90, kind="cosine", rule="official") == rates(0.05, 90, kind="cosine", rule="paper")
    assert LearningRateParams(kind="cosine", warmup_epochs=0).rule == "paper"


def test_the_official_cosine_is_counted_from_the_end_of_a_warm_up_that_does_not_overshoot():
    actual = rates(0.05, 90, kind="cosine", rule="official", warmup_epochs=3)
    # Values printed by the authors' ImageNet program, to its digits.
    assert [float(f"{rate:.4g}") for rate in actual[:3]] == [0.01667, 0.03333, 0.05]
    assert actual[3] == pytest.approx(0.04998, abs=6e-6) and actual[4] == pytest.approx(0.0499, abs=6e-5)
    assert max(actual) == pytest.approx(0.05, rel=1e-12) and actual[3:] == sorted(actual[3:], reverse=True)
    # The cosine after the warm-up covers the remaining 87 epochs.
    assert actual[3:] == pytest.approx(rates(0.05, 87, kind="cosine"), rel=1e-12)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.01), (1, 9.99994e-3), (40_000, 7.74171e-3), (80_000, 5.40528e-3), (120_000, 2.94303e-3)]
)
def test_the_polynomial_rate_of_a_step_is_that_of_mmsegmentation(step, rate):
    assert polynomial_rate(0.01, step, 160_000) == pytest.approx(rate, rel=1e-6)
