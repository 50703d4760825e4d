"""Images to label next: more of the small classes than a random choice, no two alike, and the greedy rule."""

import numpy as np
import pytest
import torch

from pipeline.labels.next_images import choose_images, class_probabilities, wanted_classes
from pipeline.shared.errors import ParamsError
from tests.support.clusters import clusters, labelled

COUNTS = [120, 60, 30, 12, 8, 5]


@pytest.fixture(scope="module")
def pool():
    features, labels, _ = clusters([160, 90, 48, 20, 14, 9])
    first = torch.cat([(labels == label).nonzero().flatten()[:count] for label, count in enumerate(COUNTS)])
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[first] = False
    return labelled(features[first], labels[first]), features[rest], labels[rest]


def test_most_of_the_chosen_images_are_of_small_classes_where_few_of_the_pool_are(pool):
    images, features, labels = pool
    wanted = wanted_classes("few", images)
    choices = choose_images(images, features, wanted, 15)
    chosen = labels[[choice.index for choice in choices]].numpy()
    assert wanted[chosen].mean() > 0.9 and wanted[labels.numpy()].mean() < 0.2
    assert set(chosen) >= {3, 4, 5}  # the gain of a class falls with the images that it is expected to get
    assert abs(sum(choice.hit for choice in choices) - wanted[chosen].sum()) < 2


def test_a_near_copy_is_not_chosen_while_other_images_promise_as_much(pool):
    images, features, labels = pool
    tail = int((labels == 5).nonzero()[0])
    copies = features[tail] + 1e-3 * torch.randn(6, 24, generator=torch.Generator().manual_seed(3))
    choices = choose_images(images, torch.cat([features, copies]), wanted_classes("class 5", images), 4)
    alike = [choice.index for choice in choices if choice.index == tail or choice.index >= len(features)]
    assert len(alike) <= 1


def test_each_choice_has_the_largest_gain_of_a_plain_loop(pool):
    images, features, _ = pool
    wanted = wanted_classes("few", images)
    p = class_probabilities(images, features).double().numpy()[:, wanted]
    unit = torch.nn.functional.normalize(features, dim=1).double().numpy()
    expected, chosen = images.counts[wanted].astype(float), []
    for choice in choose_images(images, features, wanted, 6):
        gains = [
            (p[i] / expected).sum() * (1 - max([0.0, *(unit[i] @ unit[j] for j in chosen)])) if i not in chosen else -1
            for i in range(len(p))
        ]
        assert choice.index == int(np.argmax(gains)) and choice.gain == pytest.approx(max(gains), rel=1e-3)
        chosen.append(choice.index)
        expected += p[choice.index]


def test_wanted_classes_are_a_group_a_class_or_all(pool):
    images = pool[0]
    assert wanted_classes("medium", images).tolist() == [False, True, True, False, False, False]
    assert wanted_classes("all", images).all() and wanted_classes("class 2", images).sum() == 1
    with pytest.raises(
        ParamsError, match=r"--for is 'class 9'; expected many, medium, few, all, or the name of a class"
    ):
        wanted_classes("class 9", images)
