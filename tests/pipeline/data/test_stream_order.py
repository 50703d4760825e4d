"""The order of an epoch: every image once, deterministic by seed, each row group within one window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.stream_order import assign_windows, class_share, shuffled_order
from pipeline.sources import Groups


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def row_groups(groups: int, rows: int, size: int = 100) -> Groups:
    return Groups(np.arange(groups * rows) // rows, np.full(groups, size))


@given(
    st.lists(st.integers(0, 9), max_size=60),
    st.lists(st.integers(1, 50), min_size=10, max_size=10),
    st.integers(1, 600),
    st.integers(0, 99),
)
def test_every_image_is_in_the_order_once_for_any_groups_and_window(number, sizes, window, seed):
    groups = Groups(np.array(number, dtype=np.int64), np.array(sizes))
    order = shuffled_order(len(number), groups, window, seeded(seed))
    assert sorted(order.tolist()) == list(range(len(number)))
    assert torch.equal(order, shuffled_order(len(number), groups, window, seeded(seed)))


@pytest.mark.parametrize("groups", [None, row_groups(4, 5, size=25)], ids=["files", "a table within one window"])
def test_images_without_groups_are_shuffled_as_in_memory(groups):
    assert torch.equal(shuffled_order(20, groups, 100, seeded(3)), torch.randperm(20, generator=seeded(3)))


def test_a_group_is_read_within_one_window_of_which_batches_are_drawn():
    groups = row_groups(40, 25)
    order = shuffled_order(1000, groups, 500, seeded()).numpy()
    for window in groups.number[order].reshape(8, 125):
        assert np.bincount(window).tolist().count(25) == len(set(window)) == 5
        # The first quarter of a window contains rows of nearly all its groups.
        assert len(set(window[:31])) >= 4


def test_epochs_and_seeds_differ_in_order_and_in_windows():
    generator = seeded()
    first, second = (shuffled_order(1000, row_groups(40, 25), 500, generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, shuffled_order(1000, row_groups(40, 25), 500, seeded(1)))
    together = [{frozenset(part // 25) for part in order.numpy().reshape(8, 125)} for order in (first, second)]
    assert not together[0] & together[1]


def test_a_group_without_images_of_the_split_takes_no_space_in_a_window():
    groups = Groups(np.array([0, 0, 2, 2]), np.array([10, 10_000, 10]))
    assert set(assign_windows(groups, 20, seeded())) == {0}


def test_class_share_separates_a_sorted_table_from_a_mixed_one():
    groups, labels = row_groups(40, 25), np.arange(1000) // 50
    windows = assign_windows(groups, 500, seeded())
    assert class_share(labels, windows) < 0.5
    assert class_share(np.random.default_rng(0).permutation(labels), windows) > 0.9
