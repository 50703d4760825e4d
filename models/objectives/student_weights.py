"""Weights of the loss terms of the student's objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ContrastEncoder = Literal["teacher", "momentum", "self", "text", "teacher_and_text"]


@dataclass(frozen=True)
class StudentWeights:
    """Weights of the student's loss terms, as in the official code: gamma for L_cls, beta for L_GML + L_tau, alpha for L_KD.

    A term of weight 0 is not computed, nor is anything that only this term needs. prior_strength is α of Eq. 10,
    adjustment the strength of the logit adjustment in L_cls (1 in Eq. 6).
    """

    gamma: float
    beta: float
    alpha: float
    distillation_temperature: float
    prior_strength: float
    adjustment: float = 1.0

    def needs_teacher(self, contrast_encoder: ContrastEncoder) -> bool:
        """Whether a step runs the teacher: for L_KD, or for the contrast features of L_GML."""
        return self.alpha > 0 or (self.beta > 0 and contrast_encoder in ("teacher", "teacher_and_text"))
