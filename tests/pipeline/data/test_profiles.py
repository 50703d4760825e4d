"""Long-tail profiles: the published CIFAR-LT counts and selected indices, and the formulas of the other profiles."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.profiles import choose_images, class_sizes

CIFAR10 = {
    10: [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
    50: [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
    100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
}
CIFAR100_EVERY_TENTH = {
    10: [500, 396, 314, 248, 197, 156, 123, 98, 77, 61, 50],
    50: [500, 336, 226, 152, 102, 69, 46, 31, 21, 14, 10],
    100: [500, 314, 197, 123, 77, 48, 30, 19, 12, 7, 5],
}
# Data set, factor → total, (many, medium, few), sha256[:16] of all kept within-class ranks, class order, int64.
SPLITS = {
    (10, 10): (20431, (10, 0, 0), "2b3a8656bec514c6"),
    (10, 50): (13996, (9, 1, 0), "7bb90363b243a944"),
    (10, 100): (12406, (8, 2, 0), "8a54f5b6fa972295"),
    (100, 10): (19573, (69, 31, 0), "5906ba7310b91b5e"),
    (100, 50): (12608, (41, 41, 18), "1bc82de2629e5cbd"),
    (100, 100): (10847, (35, 35, 30), "f123ec136d44ab1b"),
}


def sizes_of(classes, factor):
    return class_sizes("exponential", [50_000 // classes] * classes, factor)


@pytest.mark.parametrize("factor", [10, 50, 100])
def test_the_published_counts_of_the_long_tailed_cifar_sets(factor):
    assert sizes_of(10, factor) == CIFAR10[factor]
    sizes = sizes_of(100, factor)
    assert [*sizes[:91:10], sizes[99]] == CIFAR100_EVERY_TENTH[factor]


@pytest.mark.parametrize(("classes", "factor"), SPLITS)
def test_the_six_cifar_splits_by_total_groups_and_hash_of_every_index(classes, factor):
    total, groups, digest = SPLITS[classes, factor]
    sizes = sizes_of(classes, factor)
    assert sum(sizes) == total
    many, few = sum(size > 100 for size in sizes), sum(size < 20 for size in sizes)
    assert (many, classes - many - few, few) == groups
    # Class-contiguous labels in file order, so that a rank within the class is the index less the class's start.
    per_class = 50_000 // classes
    kept = choose_images(np.repeat(np.arange(classes), per_class), sizes, seed=0)
    ranks = np.concatenate([indexes - c * per_class for c, indexes in enumerate(kept)]).astype("<i8")
    assert hashlib.sha256(ranks.tobytes()).hexdigest()[:16] == digest


def test_the_choice_does_not_depend_on_how_the_classes_are_interleaved():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 500))
    kept = choose_images(labels, sizes_of(100, 100), seed=0)
    ranks = [np.searchsorted(np.flatnonzero(labels == c), indexes) for c, indexes in enumerate(kept)]
    assert ranks[0][:5].tolist() == [90, 254, 283, 445, 461]
    assert ranks[1][:3].tolist() == [277, 307, 436]
    assert ranks[99].tolist() == [348, 153, 363, 361, 299]


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=8), st.integers(0, 2**32 - 1), st.floats(1, 5), st.floats(1, 5)
)
def test_a_larger_imbalance_keeps_a_subset_of_a_smaller_one(available, seed, factor, more):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(available)), available))
    large = [max(1, int(size / factor)) for size in available]
    small = [max(1, int(size / more)) for size in large]
    for kept, fewer, members in zip(
        choose_images(labels, large, seed), choose_images(labels, small, seed), available, strict=True
    ):
        assert fewer.tolist() == kept[: len(fewer)].tolist()
        assert len(set(kept.tolist())) == len(kept) <= members


@given(st.integers(2, 50), st.integers(50, 2000), st.floats(1, 40))
def test_every_profile_falls_from_the_head_to_the_head_over_the_factor(classes, head, factor):
    available = [head] * classes
    for profile in ("exponential", "pareto", "step"):
        sizes = class_sizes(profile, available, factor)
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == head and abs(sizes[-1] - head / factor) <= 1
    assert class_sizes("natural", available, factor) == available


def test_step_keeps_the_first_half_whole_and_the_rest_at_the_tail():
    assert class_sizes("step", [100] * 5, 20) == [100, 100, 5, 5, 5]


def test_pareto_follows_a_power_of_the_rank():
    sizes = class_sizes("pareto", [1000] * 4, 8)
    # 8 = 4^a gives a = 1.5: 1000, 1000/2^1.5, 1000/3^1.5, 1000/8.
    assert sizes == [1000, 353, 192, 125]


@given(st.lists(st.integers(30, 500), min_size=2, max_size=12), st.sampled_from(["exponential", "pareto", "step"]))
def test_no_class_keeps_more_than_it_has(available, profile):
    assert all(size <= count for size, count in zip(class_sizes(profile, available, 10), available, strict=True))


@pytest.mark.parametrize("profile", ["exponential", "pareto", "step"])
def test_a_factor_that_empties_the_tail_is_rejected_with_the_largest_allowed_factor(profile):
    with pytest.raises(ValueError, match=r"leaves class [24] without images") as caught:
        class_sizes(profile, [50] * 5, 51)
    assert str(caught.value).endswith("lower the factor to at most 50")
    assert min(class_sizes(profile, [50] * 5, 50)) == 1


def test_an_unknown_profile_is_rejected_with_the_allowed_ones():
    with pytest.raises(ValueError, match="profile is 'linear'; expected natural, exponential, pareto or step"):
        class_sizes("linear", [5, 5], 2)
