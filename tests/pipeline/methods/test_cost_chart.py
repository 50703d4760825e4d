"""The picture of accuracy against cost: every name can be read."""

from __future__ import annotations

import itertools
import random

from pipeline.methods.catalogue import METHODS
from pipeline.methods.page import BOTTOM, HEIGHT, MARK, TOP, WIDTH, Box, name_boxes


def test_no_name_of_a_full_chart_covers_a_point_or_another_name() -> None:
    names = [method.name for method in METHODS]
    for seed in range(20):
        numbers = random.Random(seed)
        # Two thirds of the methods cost about the same, as class losses do.
        costs = [
            numbers.uniform(100, 700) if number % 3 == 0 else numbers.uniform(100, 140) for number in range(len(names))
        ]
        points = [(cost, numbers.triangular(10, HEIGHT - TOP - BOTTOM - 10)) for cost in costs]
        boxes = name_boxes(points, names)
        assert all(box.left >= 0 and box.right <= WIDTH for box in boxes)
        crowded = [(one, other) for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
        marks = [Box(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in points]
        covered = [(box, mark) for box in boxes for mark in marks if box.overlaps(mark)]
        assert (crowded, covered) == ([], [])
