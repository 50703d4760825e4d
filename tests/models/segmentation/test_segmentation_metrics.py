"""Golden number M1, and areas against a plain count."""

import numpy as np
import pytest

from models.prior import pixel_groups
from models.segmentation.metrics import Areas

TRUTH = np.array([[0, 0, 1], [1, 2, 255], [0, 0, 3]], dtype=np.uint8)
PREDICTION = np.array([[0, 1, 1], [1, 0, 2], [0, 0, 2]], dtype=np.uint8)


def m1():
    areas = Areas.zero(5)
    areas.add(PREDICTION, TRUTH)
    return areas


def rounded(values):
    return [None if np.isnan(value) else round(value, 10) for value in values]


def test_m1_one_image():
    areas = m1()
    assert areas.intersection.tolist() == [3, 2, 0, 0, 0]
    assert (areas.predicted + areas.labelled - areas.intersection).tolist() == [5, 3, 2, 1, 0]
    assert rounded(areas.iou()) == [0.6, 0.6666666667, 0, 0, None]
    assert rounded(areas.accuracy()) == [0.75, 1, 0, 0, None]
    assert areas.metrics() == pytest.approx({"miou": 0.31666666667, "macc": 0.4375, "aacc": 0.625})


def test_m1_areas_are_summed_over_images_before_the_division():
    areas = m1()
    areas.add(np.array([[2, 2, 4]]), np.array([[2, 2, 2]]))
    assert rounded(areas.iou()) == [0.6, 0.6666666667, 0.4, 0, 0]
    assert rounded(areas.accuracy()) == [0.75, 1, 0.5, 0, None]
    assert areas.metrics() == pytest.approx({"miou": 1 / 3, "macc": 0.5625, "aacc": 7 / 11})


def test_areas_do_not_depend_on_the_grouping_of_images():
    generator = np.random.default_rng(0)
    labels, predictions = (generator.integers(0, 7, (6, 9, 8)) for _ in range(2))
    labels[generator.random(labels.shape) < 0.1] = 255
    together, apart = Areas.zero(7), Areas.zero(7)
    together.add(predictions, labels)
    for label, prediction in zip(labels, predictions, strict=True):
        apart.add(prediction, label)
    valid = labels != 255
    for c in range(7):
        inter = (valid & (labels == c) & (predictions == c)).sum()
        union = (valid & ((labels == c) | (predictions == c))).sum()
        assert together.iou()[c] == inter / union
    assert np.array_equal(together.iou(), apart.iou())


@pytest.mark.parametrize(
    ("prediction", "labels", "message"),
    [
        (PREDICTION, TRUTH[:2], r"prediction has shape \[3, 3\]; its label map has \[2, 3\]"),
        (PREDICTION, np.where(TRUTH == 255, 7, TRUTH), "label map has the value 7; expected 0 to 4"),
        (PREDICTION + 3, TRUTH, "prediction has the value 5; expected 0 to 4"),
    ],
)
def test_areas_of_another_size_or_class_are_refused(prediction, labels, message):
    with pytest.raises(ValueError, match=message):
        Areas.zero(5).add(prediction, labels)


def test_groups_are_terciles_of_the_pixel_share():
    groups = pixel_groups([5, 900, 40, 700, 10, 60, 3, 800])
    assert groups == ["few", "many", "medium", "many", "medium", "medium", "few", "many"]
    areas = m1()
    values = areas.metrics(pixel_groups([50, 20, 10, 5, 1]))
    assert values["miou_many"] == pytest.approx((0.6 + 2 / 3) / 2)
    assert values["miou_few"] is None
    assert values["macc_medium"] == 0
