"""Memories of contrast terms: the queue, the class means, random numbers of a counter, and resuming."""

import copy

import pytest
import torch

from models.contrast.crd import CRD
from models.contrast.kcl import KPositiveContrast
from models.contrast.memories import ClassMoments, FifoQueue, counter_random
from tests.support.contrast_cases import inputs, unchanged, unit


def test_the_queue_replaces_its_oldest_rows():
    queue = FifoQueue(4, 2)
    assert queue.labels.tolist() == [-1] * 4
    for start in (0, 2, 4):
        labels = torch.arange(start, start + 2)
        queue.enqueue(labels[:, None].expand(-1, 2).float(), labels)
    assert queue.labels.tolist() == [4, 5, 2, 3]
    assert queue.features[:, 0].tolist() == [4, 5, 2, 3]


def test_a_total_below_the_batch_is_refused():
    with pytest.raises(ValueError, match=r"queue total K is 3, below the batch of 4 images .*raise K"):
        FifoQueue(3, 2).enqueue(unit(4, 2), torch.zeros(4, dtype=torch.int64))


def test_a_queue_that_is_no_multiple_of_the_batch_holds_the_last_k_keys():
    queue, features, labels = FifoQueue(10, 2), unit(24, 2).float(), torch.arange(24)
    for start in range(0, 24, 4):
        queue.enqueue(features[start : start + 4], labels[start : start + 4])
        stored = queue.labels[queue.labels >= 0].sort().values
        assert stored.tolist() == list(range(max(start + 4 - 10, 0), start + 4))
    assert torch.equal(features[queue.labels], queue.features)


def test_class_means_cover_this_epoch_and_the_one_before_and_a_resumed_epoch_keeps_them():
    moments = ClassMoments(2, 1)
    for epoch, value in enumerate([1.0, 2.0, 6.0]):
        moments.begin_epoch(epoch)
        moments.add(torch.tensor([[value], [value]]), torch.tensor([0, 0]))
        moments.begin_epoch(epoch)
    assert moments.means().tolist() == [[4.0], [0.0]]


def test_random_numbers_depend_on_the_counter_and_are_uniform():
    first, second = (counter_random(torch.tensor(step), (4, 5000)) for step in (0, 1))
    assert torch.equal(first, counter_random(torch.tensor(0), (4, 5000))) and not torch.equal(first, second)
    assert torch.equal(first[2:], counter_random(torch.tensor(0), (2, 5000), offset=10000))
    shares = torch.bincount((first % 10).flatten(), minlength=10) / first.numel()
    assert shares.tolist() == pytest.approx([0.1] * 10, abs=0.01)


def k_positive(seed):
    return KPositiveContrast(unchanged(), FifoQueue(8, 6, torch.Generator().manual_seed(seed)), 0.1, positives=1)


def distilled(seed):
    torch.manual_seed(seed)
    return CRD(6, 6, torch.arange(12) % 3, dim=4, negatives=5).double()


@pytest.mark.parametrize("made", [k_positive, distilled])
def test_a_term_resumes_from_its_state(made):
    def run(term, steps):
        losses = []
        for step in steps:
            batch = inputs(
                unit(1, 4, 6, seed=step), torch.arange(4) % 3, torch.arange(4), key=unit(4, 6, seed=step + 50)
            )
            losses.append(term(batch)["loss"].item())
            term.after_step()
        return losses

    term = made(0)
    run(term, range(3))
    state = copy.deepcopy(term.state_dict())
    expected = run(term, range(3, 6))
    resumed = made(1)
    resumed.load_state_dict(state)
    assert run(resumed, range(3, 6)) == expected
