"""Sampling of images by class: shares for each power, and equal images within a class."""

import pytest
import torch

from models.class_sampler import ClassSampler

COUNTS = torch.tensor([60, 0, 20, 5])
LABELS = torch.arange(4).repeat_interleave(COUNTS)[torch.randperm(85, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0, -1.0])
def test_classes_are_drawn_by_the_power_of_their_size_and_their_images_equally(power):
    drawn = ClassSampler(LABELS, 4, power).draw(60_000, torch.Generator().manual_seed(0))
    expected = torch.where(COUNTS > 0, COUNTS.double() ** power, 0)
    expected /= expected.sum()
    shares = torch.bincount(LABELS[drawn], minlength=4) / len(drawn)
    assert torch.allclose(shares.double(), expected, atol=0.01)
    times = torch.bincount(drawn, minlength=len(LABELS)).double()
    each = expected[LABELS] / COUNTS[LABELS] * len(drawn)
    assert ((times - each).abs() < 6 * each.sqrt()).all()
