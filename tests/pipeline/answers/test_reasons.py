"""Reasons of wrong answers: the most confident mistakes and their nearest training images, against a plain loop."""

import numpy as np
import torch

from models.prior import softmax
from pipeline.answers.reasons import NEAREST, SHOWN, confident_mistakes
from pipeline.data.dataset import Images
from tests.support.generated_run import HOSTILE, made_report


class NoFiles:
    def read(self, reference):
        raise AssertionError(reference)


def images_of(vectors, labels):
    ids = [str(index) for index in range(len(labels))]
    return Images(torch.from_numpy(vectors).float(), torch.from_numpy(labels), ids, ids, NoFiles())


def features(images, rows):
    return images.images[rows]


def test_the_most_confident_mistakes_have_the_training_images_of_largest_cosine():
    random, classes = np.random.default_rng(0), ["ant", "bee", "cat"]
    labels, given = np.arange(60) % 3, np.repeat([0, 1, 2], [40, 15, 2])
    tested, stored = random.normal(size=(60, 7)), random.normal(size=(57, 7))
    p = softmax(2 * random.normal(size=(60, 3)))
    found = confident_mistakes(features, images_of(tested, labels), p, images_of(stored, given), classes, 1000)
    wrong = [row for row in np.argsort(-p.max(1)) if p[row].argmax() != labels[row]][:SHOWN]
    assert [each.row for each in found] == wrong and len(found) == SHOWN
    unit = stored / np.linalg.norm(stored, axis=1, keepdims=True)
    for each in found:
        cosines = unit @ tested[each.row] / np.linalg.norm(tested[each.row])
        assert [near.row for near in each.nearest] == np.argsort(-cosines)[:NEAREST].tolist()
        np.testing.assert_allclose([near.cosine for near in each.nearest], np.sort(cosines)[::-1][:NEAREST], atol=1e-6)
        assert [near.label for near in each.nearest] == [classes[given[near.row]] for near in each.nearest]
        assert (each.actual, each.predicted) == (classes[labels[each.row]], classes[p[each.row].argmax()])
        assert each.probability == p[each.row].max()


def test_few_rows_still_have_an_image_of_each_class_and_no_mistake_has_no_reason():
    labels = np.array([0, 1, 2])
    right, tested = np.eye(3), images_of(np.eye(3), labels)
    assert confident_mistakes(features, tested, right, tested, ["a", "b", "c"], 1) == []
    [found] = confident_mistakes(features, tested, right[[0, 1, 1]], tested, ["a", "b", "c"], 1)
    assert found.row == 2 and sorted(near.label for near in found.nearest) == ["a", "b", "c"]


def test_the_report_shows_them_with_names_as_text():
    page = made_report(12, 20)
    section = page[page.index('<section id="mistakes">') :]
    section = section[: section.index("</section>")]
    assert "Most confident mistakes" in section and "training image of" in section and "0.75" in section
    assert HOSTILE[0] not in section and "&lt;script&gt;" in section
