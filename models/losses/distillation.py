"""Distillation loss: KL divergence between the softened distributions of teacher and student."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """L_KD: KL(teacher || student) at the temperature, summed over classes, mean over the batch, times temperature².

    Both logits [B,C], scaled by 1/tau_s and without the prior (from the official code: the paper does not define it; T
    = 4 there). No gradient flows to the teacher.
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
