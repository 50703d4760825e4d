"""Planted label errors of benchmarks.label_errors: their number, their kind, and the precision of a ranking."""

import numpy as np
import pytest
import torch

from benchmarks.label_errors import KINDS, Planted, plant, precisions, tailor_scores
from tests.support.clusters import clusters


@pytest.mark.parametrize("kind", KINDS)
def test_five_percent_of_the_labels_are_wrong_and_every_class_keeps_an_image(kind):
    features, labels, _ = clusters([150, 60, 30, 2, 1])
    planted = plant(features, labels, kind, 100, 0)
    assert len(planted.labels) == 193 and planted.wrong.sum() == 10
    original = {tuple(row.tolist()): int(label) for row, label in zip(features, labels, strict=True)}
    true = torch.tensor([original[tuple(row.tolist())] for row in planted.features])
    assert torch.equal(true != planted.labels, planted.wrong)
    assert torch.bincount(true[~planted.wrong], minlength=5).min() >= 1


def test_a_perfect_ranking_has_the_highest_possible_precision_and_ours_is_close_to_it():
    planted = plant(*clusters([400, 300, 60, 30, 12, 9])[:2], "random", 400, 0)
    perfect = precisions(-planted.wrong.numpy().astype(float), planted)
    assert all(first == possible and r == 1 for possible, first, r in perfect.values())
    ours = precisions(tailor_scores(planted), planted)
    assert all(first >= 0.9 * possible for possible, first, _ in ours.values())


def test_precision_is_counted_among_the_images_of_a_group():
    labels = torch.tensor([0] * 110 + [1] * 10)
    wrong = torch.zeros(120, dtype=torch.bool)
    wrong[[0, 1, 110]] = True
    scores = np.arange(120.0)
    found = precisions(scores, Planted(torch.zeros(120, 1), labels, wrong))
    assert found["many"] == (0.02, 0.02, 1.0) and found["few"] == (0.01, 0.01, 1.0)
