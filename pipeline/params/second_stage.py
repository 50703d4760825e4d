"""Section `classifier` of params.yaml: a second stage that refits the classifier of the trained student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.params.section import Count, NonNegative, Number, Positive, PositiveInt, Section, Share

TRAINING = {"epochs", "batch_size", "learning_rate", "weight_decay"}
# Keys that each kind uses; all kinds use views and shift_batch_norm.
USED = {
    "none": set[str](),
    "ncm": set[str](),
    "tau_norm": TRAINING | {"tau"},
    "crt": TRAINING,
    "balanced_softmax": TRAINING,
    "lws": TRAINING | {"start"},
    "disalign": TRAINING | {"start"},
    "mislas": TRAINING | {"start", "smoothing"},
    "los": TRAINING | {"start"},
    "balms": TRAINING | {"start"},
    "metasaug": TRAINING | {"start"},
}


class ClassifierParams(Section):
    """Second stage of the student (docs/second-stages.md).

    kind: the method; `none` keeps the student's classifier. start: the classifier to start from, the student's or a `linear`
    one that is fitted first by cross-entropy. tau: of tau_norm; null: that with the best balanced accuracy on validation
    images. smoothing: of mislas, of the class with the most and with the fewest images. epochs, batch_size, learning_rate,
    weight_decay: null for the method's own. views: augmented views of each image whose features are used; 0: the image
    itself; of an encoder always its stored views. shift_batch_norm: estimate the statistics of batch norm again, with all
    classes equally likely.
    """

    kind: Literal[
        "none", "ncm", "tau_norm", "crt", "balanced_softmax", "lws", "disalign", "mislas", "los", "balms", "metasaug"
    ] = "none"
    start: Literal["student", "linear"] = "student"
    tau: Annotated[Number, Field(ge=0, le=2)] | None = None
    smoothing: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.4, 0.1]
    epochs: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    learning_rate: Positive | None = None
    weight_decay: NonNegative | None = None
    views: Annotated[Count, Field(le=64)] = 1
    shift_batch_norm: bool = False

    @property
    def fits_anew(self) -> bool:
        """Whether the second stage does not use the student's classifier."""
        return self.kind in ("ncm", "tau_norm", "crt", "balanced_softmax") or (
            self.kind != "none" and self.start == "linear"
        )

    @model_validator(mode="after")
    def _keys_belong_to_the_kind(self) -> ClassifierParams:
        for key in sorted(TRAINING | {"smoothing", "start", "tau"}):
            value, default = getattr(self, key), type(self).model_fields[key].default
            if self.kind != "none" and value != default and key not in USED[self.kind]:
                users = ", ".join(kind for kind in USED if key in USED[kind])
                shown = "null" if default is None else default
                raise ValueError(
                    f"{key} is {value}, which kind {self.kind} does not use (only {users}); set {key}: {shown}"
                )
        return self
