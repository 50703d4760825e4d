"""Errors of the student that are found before the teacher is trained."""

import pytest

from pipeline.data.class_prior import Prior
from pipeline.shared.errors import ParamsError
from pipeline.training.run import check_recipe
from tests.support.making import params

PRIOR = Prior(["a", "b", "c"], [50, 12, 3], [0.5, 0.3, 0.2], [-0.7, -1.2, -1.6], ["many", "medium", "few"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.backbone": "resnet21"}, r"^student\.backbone: backbone 'resnet21' is unknown"),
        (
            {"student.classifier": {"kind": "causal", "heads": 6}},
            r"^student\.classifier\.heads is 6, which does not divide the feature's 64 values; expected a divisor such as 4",
        ),
        ({"student.queue_total": 2}, r"^student\.queue_total, student\.queue_minimum: "),
    ],
)
def test_a_student_that_cannot_be_built_is_refused_before_the_teacher_is_trained(changes, message):
    made = params(changes)
    with pytest.raises(ParamsError, match=message):
        check_recipe(made.teacher, made.student, PRIOR)
