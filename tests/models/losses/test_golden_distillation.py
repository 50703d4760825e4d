"""KD and PC softmax: golden values in float64, from hand-written numpy of the papers' formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.losses.class_loss import ClassLoss
from models.losses.distillation import distillation_loss
from models.prior import adjust_logits

EXACT = {"rel": 0, "abs": 1e-12}
STUDENT = torch.tensor([[2, 0, -1], [0.5, 1, 0]], dtype=torch.float64)
TEACHER = torch.tensor([[3, 1, -2], [0, 2, 1]], dtype=torch.float64)
TARGET = torch.tensor([0, 2])
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64).log()


def test_distillation_has_the_golden_rows_and_mean():
    rows = [distillation_loss(STUDENT[i : i + 1], TEACHER[i : i + 1], 4.0).item() for i in range(2)]
    assert rows == pytest.approx([0.287721291188254, 0.225961063294472], **EXACT)
    assert distillation_loss(STUDENT, TEACHER, 4.0).item() == pytest.approx(0.256841177241363, **EXACT)


def test_cross_entropy_and_distillation_with_the_weights_of_repdistiller_have_the_golden_value_and_gradient():
    logits = STUDENT.clone().requires_grad_()
    rows = F.cross_entropy(logits, TARGET, reduction="none")
    assert rows.tolist() == pytest.approx([0.169846019556286, 1.680269670641735], **EXACT)
    loss = 0.1 * ClassLoss(UNIFORM, 0.0)(logits, TARGET) + 0.9 * distillation_loss(logits, TEACHER, 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.323662844027128, **EXACT)
    golden = [
        -0.092820411914426, -0.045851501566744, 0.138671913481170,
        0.154551574308427, -0.052926328292333, -0.101625246016094,
    ]  # fmt: skip
    assert logits.grad.flatten().tolist() == pytest.approx(golden, **EXACT)


def test_pc_softmax_is_the_logit_adjustment_of_the_server_at_strength_0():
    logits = torch.tensor([2, 0.5, -1], dtype=torch.float64)
    moved = adjust_logits(logits, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log(), -1.0) - math.log(3)
    assert moved.tolist() == pytest.approx([1.594534891892, 0.605360515658, -0.489174376234], abs=1e-11)
