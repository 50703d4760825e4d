"""Section `student.experts` of params.yaml: a network with several experts and its loss."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

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


class SadeParams(Section):
    """SADE: three experts on one trunk, for the training prior, a balanced and a reversed prior of strength `strength`."""

    kind: Literal["sade"]
    narrow: bool = True
    strength: NonNegative = 2.0
    count: ClassVar[int] = 3
    shared: ClassVar[Literal["early"]] = "early"


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

    @model_validator(mode="after")
    def _shares_rise(self) -> ResltParams:
        first, second = self.leave_out
        if not first <= second < 1:
            raise ValueError(f"leave_out is {self.leave_out}; expected two rising shares below 1")
        return self


ExpertsParams = Annotated[RideParams | SadeParams | NclParams | ResltParams, Field(discriminator="kind")]
