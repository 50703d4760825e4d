"""Class-wise queues: lengths against exact fractions, enqueue against a reference that adds one sample at a time."""

import itertools
import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.contrast.queues import ClassQueues, queue_lengths

CIFAR10_IF100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def cifar100(factor):
    """Class counts of CIFAR-100-LT by the rule of gml-facts section 1, implemented independently."""
    return [math.floor(500 * (1 / factor) ** (c / 99)) for c in range(100)]


@st.composite
def requests(draw):
    counts = draw(st.lists(st.integers(0, 6000), min_size=1, max_size=40).filter(any))
    minimum = draw(st.integers(1, 5))
    return counts, minimum * len(counts) + draw(st.integers(0, 3000)), minimum


def quotas(counts, total, minimum):
    """Eq. 5 in exact fractions."""
    samples = sum(counts)
    return [minimum + (total - minimum * len(counts)) * Fraction(count, samples) for count in counts]


@given(requests())
def test_lengths_sum_to_the_total_and_each_is_the_floor_or_the_ceiling_of_equation_5(request_):
    counts, total, minimum = request_
    lengths = queue_lengths(counts, total, minimum)
    assert sum(lengths) == total
    for length, quota in zip(lengths, quotas(counts, total, minimum), strict=True):
        assert length in (math.floor(quota), math.ceil(quota))
        assert length >= minimum


@given(requests())
def test_the_run_of_a_class_ends_at_the_ceiling_of_the_cumulative_equation_5(request_):
    counts, total, minimum = request_
    end, exact = 0, Fraction(0)
    for length, quota in zip(queue_lengths(counts, total, minimum), quotas(counts, total, minimum), strict=True):
        end, exact = end + length, exact + quota
        assert end == math.ceil(exact)


@given(requests())
def test_a_class_whose_share_is_a_whole_row_larger_never_gets_fewer_rows(request_):
    counts, total, minimum = request_
    ordered = sorted(zip(quotas(counts, total, minimum), queue_lengths(counts, total, minimum), strict=True))
    for (small, short), (large, long) in itertools.pairwise(ordered):
        assert long >= short or large - small < 1


def test_lengths_of_the_long_tailed_cifar_sets():
    lengths = queue_lengths(cifar100(100), 4096, 2)
    assert lengths[:5] == [182, 173, 166, 158, 151] and lengths[-5:] == [4, 4, 4, 4, 3]
    lengths = queue_lengths(cifar100(50), 4096, 2)
    assert lengths[:3] == [157, 150, 145] and lengths[-1] == 5
    lengths = queue_lengths(cifar100(10), 4096, 2)
    assert lengths[:3] == [102, 99, 97] and lengths[-1] == 11
    assert queue_lengths(CIFAR10_IF100, 4096, 2) == [1645, 987, 592, 356, 214, 129, 78, 48, 29, 18]


@pytest.mark.parametrize(
    ("counts", "total", "minimum", "message"),
    [
        ([], 4, 1, "none negative and not all 0"),
        ([0, 0], 4, 1, "none negative and not all 0"),
        ([3, -1], 4, 1, "none negative and not all 0"),
        ([3, 1], 4, 0, "k_m is 0; expected at least 1"),
        ([3, 1, 1], 5, 2, "K is 5, below minimum k_m * classes = 2 * 3; raise the total to at least 6"),
    ],
)
def test_invalid_queue_lengths_raise_an_error_with_valid_values(counts, total, minimum, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        queue_lengths(counts, total, minimum)


class SlowQueues:
    """Reference queues: lists of (id, feature), one sample at a time, as in gml-facts section 4."""

    def __init__(self, queues):
        self.rows = [(int(i), row.tolist()) for i, row in zip(queues.sample_ids, queues.features, strict=True)]
        self.lengths = queues.lengths.tolist()
        self.pointers = [0] * len(self.lengths)

    def enqueue(self, features, labels, ids):
        taken = [0] * len(self.lengths)
        for feature, label, sample in zip(features, labels, ids, strict=True):
            if taken[label] < self.lengths[label]:
                slot = (self.pointers[label] + taken[label]) % self.lengths[label]
                self.rows[sum(self.lengths[:label]) + slot] = (sample, feature)
                taken[label] += 1
        for label, length in enumerate(self.lengths):
            self.pointers[label] = (self.pointers[label] + taken[label]) % length


@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=5),
    st.integers(0, 12),
    st.integers(1, 3),
    st.data(),
)
def test_enqueue_equals_a_queue_written_one_sample_at_a_time_over_several_batches(counts, spare, minimum, data):
    classes = len(counts)
    queues = ClassQueues(counts, minimum * classes + spare, minimum, dim=2, generator=torch.Generator().manual_seed(0))
    slow, next_id = SlowQueues(queues), 0
    for _ in range(data.draw(st.integers(1, 5))):
        labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=14))
        ids = list(range(next_id, next_id + len(labels)))
        next_id += len(labels)
        features = [[float(i), -float(i)] for i in ids]
        queues.enqueue(torch.tensor(features), torch.tensor(labels), torch.tensor(ids))
        slow.enqueue(features, labels, ids)
        assert queues.sample_ids.tolist() == [sample for sample, _ in slow.rows]
        assert queues.features.tolist() == [feature for _, feature in slow.rows]
        assert queues.pointers.tolist() == slow.pointers
    assert queues.fill().item() == pytest.approx(sum(sample >= 0 for sample, _ in slow.rows) / len(slow.rows))


def test_a_large_batch_of_one_class_keeps_its_earliest_samples_and_touches_no_other_class():
    queues = ClassQueues([300, 5], 20, 2, dim=1)
    before = queues.sample_ids.clone()
    count, length = 300, int(queues.lengths[1])
    queues.enqueue(torch.arange(count)[:, None].float(), torch.ones(count, dtype=torch.int64), torch.arange(count))
    start = int(queues.starts[1])
    assert queues.sample_ids[start:].tolist() == list(range(length))
    assert torch.equal(queues.sample_ids[:start], before[:start])
    assert queues.pointers.tolist() == [0, 0]


def test_a_fresh_memory_holds_unit_features_with_ids_that_match_no_sample():
    queues = ClassQueues([50, 12, 3], 16, 2, dim=8)
    assert torch.allclose(queues.features.norm(dim=1), torch.ones(16))
    assert len(set(queues.sample_ids.tolist())) == 16 and (queues.sample_ids < 0).all()
    assert queues.row_class.tolist() == [0] * 10 + [1] * 4 + [2] * 2
    assert queues.starts.tolist() == [0, 10, 14] and queues.fill() == 0


def test_enqueue_reads_nothing_back_and_runs_under_a_traced_graph_with_static_shapes():
    from torch.fx.experimental.proxy_tensor import make_fx

    queues = ClassQueues([50, 12, 3], 16, 2, dim=2)

    def step(features, labels, ids):
        queues.enqueue(features, labels, ids)
        return queues.sample_ids

    # Tracing with symbolic data fails at the first value that is read by the host or determines a shape.
    labels = torch.tensor([0, 2, 2])
    make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.zeros(3, 2), labels, torch.arange(3))


def test_the_memory_survives_its_state_dict():
    counts = [50, 12, 3]
    queues, other = ClassQueues(counts, 16, 2, dim=3), ClassQueues(counts, 16, 2, dim=3)
    queues.enqueue(torch.randn(5, 3), torch.tensor([0, 2, 2, 1, 2]), torch.arange(5))
    other.load_state_dict(queues.state_dict())
    for module in (queues, other):
        module.enqueue(torch.ones(2, 3), torch.tensor([2, 1]), torch.tensor([90, 91]))
    assert all(
        torch.equal(a, b) for a, b in zip(queues.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert 90 in other.sample_ids and 0 in other.sample_ids


def test_the_same_generator_seed_gives_the_same_fresh_memory():
    first, second = (
        ClassQueues([5, 3], 8, 1, dim=4, generator=torch.Generator().manual_seed(3)).features for _ in range(2)
    )
    assert torch.equal(first, second)
