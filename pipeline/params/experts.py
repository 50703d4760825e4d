"""Section `student.experts` of params.yaml: a network with several experts and its loss.

Class variables that are not params: shared, the part of the backbone that the experts share (expert_backbone); balanced,
whether the logits count as those for the balanced prior, because the method's paper uses them as they are.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.params.method import CrossEntropyLoss
from pipeline.params.section import NonNegative, Number, Section, Share

Experts = Annotated[int, Field(ge=2, le=8)]


class RideParams(Section):
    """RIDE: student.loss of each expert minus diversity * T² * KL(mean of the experts || expert).

    count: experts on one trunk. narrow: 3/4 of the channels in their branches. reweight: how much the temperature T differs
    between classes, from the epoch on from which student.loss has class weights.
    """

    kind: Literal["ride"]
    count: Experts = 3
    narrow: bool = True
    diversity: NonNegative = 0.45
    reweight: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    shared: ClassVar[Literal["early"]] = "early"
    balanced: ClassVar[bool] = False  # it depends on student.loss


class SadeParams(Section):
    """SADE: three experts on one trunk, for the training prior, a balanced and a reversed prior of strength `strength`."""

    kind: Literal["sade"]
    narrow: bool = True
    strength: NonNegative = 2.0
    count: ClassVar[int] = 3
    shared: ClassVar[Literal["early"]] = "early"
    balanced: ClassVar[bool] = True


class NclParams(Section):
    """NCL: `count` whole networks, trained together; divergence: weight of their differences from each other.

    hard_share: share of the classes, at least 2 with the own, in the loss on hard classes.
    """

    kind: Literal["ncl"]
    count: Experts = 3
    hard_share: Annotated[Number, Field(gt=0, le=1)] = 0.3
    divergence: NonNegative = 0.6
    narrow: ClassVar[bool] = False
    shared: ClassVar[Literal["nothing"]] = "nothing"
    balanced: ClassVar[bool] = False  # it adjusts the logits as L_cls does


class ResltParams(Section):
    """ResLT: three branches on the last feature map, whose logits are added; they share one linear classifier.

    leave_out: shares of the classes, from the largest, that the second and the third branch do not learn. beta: weight
    of the independent losses; 1 - beta of the loss of the sum.
    """

    kind: Literal["reslt"]
    leave_out: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.35, 0.7]
    beta: Share = 0.995
    count: ClassVar[int] = 3
    narrow: ClassVar[bool] = False
    shared: ClassVar[Literal["map"]] = "map"
    balanced: ClassVar[bool] = True

    @model_validator(mode="after")
    def _shares_rise(self) -> ResltParams:
        first, second = self.leave_out
        if not first <= second < 1:
            raise ValueError(f"leave_out is {self.leave_out}; expected two rising shares below 1")
        return self


class BbnParams(Section):
    """BBN: two branches of the last block; the second learns a second batch, drawn with class shares as n ** power."""

    kind: Literal["bbn"]
    power: Annotated[Number, Field(ge=-2, le=1)] = -1.0
    count: ClassVar[int] = 2
    narrow: ClassVar[bool] = False
    shared: ClassVar[Literal["late"]] = "late"
    balanced: ClassVar[bool] = True


ExpertsParams = Annotated[RideParams | SadeParams | NclParams | ResltParams | BbnParams, Field(discriminator="kind")]


def check_experts(experts: ExpertsParams, student: Any) -> None:
    """Raise ValueError for keys of section student that do not fit its experts."""
    kind, name = experts.kind, f"experts.kind is {experts.kind}"
    head = "linear" if kind in ("reslt", "bbn") else "cosine"
    if student.classifier.kind != head:
        raise ValueError(f"classifier.kind is {student.classifier.kind}, but {name}; set classifier: {{kind: {head}}}")
    if kind != "ride" and (student.loss != CrossEntropyLoss() or student.adjustment != 1):
        raise ValueError(
            f"loss.kind is {student.loss.kind} and adjustment {student.adjustment:g}, but {name}, which has its own loss; set "
            "loss: {kind: cross_entropy} and adjustment: 1.0"
        )
    if student.loss.kind == "lade":
        raise ValueError(
            f"loss.kind is lade, whose regulariser is of one network's batch, but {name}; set another loss.kind"
        )
    if kind == "reslt" and student.accumulate > 1:
        raise ValueError(
            f"accumulate is {student.accumulate}, but {name}, whose loss divides by a sum over the whole batch; set "
            "accumulate: 1 and lower batch_size if the batch does not fit"
        )
    unused = {"alpha": 0, "beta": 0, "memory": None, "pretrained": None, "tune": "none"}
    for key, expected in unused.items():
        if getattr(student, key) != expected:
            allowed = "null" if expected is None else expected
            raise ValueError(f"{key} is {getattr(student, key)!r}, but experts are set; set {key}: {allowed}")
    if student.augment.mix != "none":
        raise ValueError(
            f"augment.mix is {student.augment.mix}, but experts need one label per image; set augment.mix: none"
        )
    if student.backbone == "encoder":
        raise ValueError(
            "backbone is encoder, whose features are stored, but experts are branches of a trained network; set experts: null"
        )
