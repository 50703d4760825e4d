"""Sections `teacher`, `student` and `engine`: what is trained, and how training runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.params.section import Count, NonNegative, Number, Positive, PositiveInt, Section, Share


class ScheduleParams(Section):
    """Learning rate by epoch: `cosine` to nearly zero, or `steps` times `factor` at each milestone; linear warm-up first.

    `rule` official is that of the authors' programs: warm-up and steps end an epoch later, a cosine starts after warm-up.
    """

    kind: Literal["cosine", "steps"]
    rule: Literal["paper", "official"] = "paper"
    warmup_epochs: Count
    milestones: list[PositiveInt] = []
    factor: Annotated[Number, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _milestones_belong_to_steps(self) -> ScheduleParams:
        if self.kind == "steps" and self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones is {self.milestones}; expected epochs in rising order")
        if self.kind == "cosine" and self.milestones:
            raise ValueError("milestones is set but kind is cosine; expected kind: steps, or no milestones")
        return self


class AugmentParams(Section):
    """Random changes of each view, in this order: crop, flip, policy, Cutout; then the mix of the classifier view.

    `crop: pad` adds crop_padding black pixels on each side of the test view, `crop: resized` resizes a box of the original
    image, of crop_scale of its area.
    `contrast_policy` is that of the query and key views. randaugment, simaugment and stacked (both, with grey and
    blur before RandAugment) begin with colour jitter of strength `jitter`. simaugment always crops `resized`, and
    has no Cutout. `bicubic`: the resampling of the authors' programs, where a shear of autoaugment is bicubic and not of
    the nearest pixel, and a move of randaugment bicubic instead of bilinear half of the time.
    """

    crop: Literal["pad", "resized"] = "pad"
    crop_padding: Count
    crop_scale: Annotated[list[Annotated[Number, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)] = [0.08, 1.0]
    flip: bool
    policy: Literal["none", "autoaugment", "randaugment", "simaugment", "stacked"] = "none"
    contrast_policy: Literal["same", "none", "autoaugment", "randaugment", "simaugment", "stacked"] = "same"
    bicubic: bool = False
    jitter: Share = 0.4
    cutout: Count
    mix: Literal["none", "cutmix", "mixup"] = "none"
    mix_alpha: Positive = 1.0

    @model_validator(mode="after")
    def _scale_rises(self) -> AugmentParams:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale is {self.crop_scale}; expected the smaller share of the area first")
        return self

    @model_validator(mode="after")
    def _some_view_takes_cutout(self) -> AugmentParams:
        if self.cutout and self.policy == "simaugment" and self.contrast_policy in ("same", "simaugment"):
            raise ValueError(
                f"cutout is {self.cutout}, but every view is simaugment, which has no Cutout; set cutout: 0"
            )
        return self


class PretrainedParams(Section):
    """A local file of weights (safetensors, under the names of the backbone's library) and its sha256, which is checked."""

    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TrainingParams(Section):
    """What teacher and student training share: network, SGD, schedule, augmentation.

    adjustment: strength of the logit adjustment in L_cls; 1 is Eq. 6, 0 plain cross-entropy. Evaluation and export add the
    rest, so that `balanced` and `train` mean the same for every strength. ema_decay: of the average of
    weights that is evaluated and kept instead of the last step's; 0 for none. accumulate: parts in which a batch goes
    through the network, for batches that the device cannot hold. pretrained: weights that the network starts from.
    """

    backbone: str
    pretrained: PretrainedParams | None = None
    tau_s: Positive
    adjustment: NonNegative = 1.0
    ema_decay: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    epochs: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]
    accumulate: PositiveInt = 1
    learning_rate: Positive
    momentum: Annotated[Number, Field(ge=0, lt=1)]
    weight_decay: NonNegative
    schedule: ScheduleParams
    augment: AugmentParams


class StudentParams(TrainingParams):
    """The student's terms: gamma·L_cls + beta·(L_GML + L_tau) + alpha·L_KD, and the class-wise queues.

    A term of weight 0 is left out of the step. contrast_encoder fills the queues: the frozen `teacher`, or a `momentum`
    copy of the student, which follows it by encoder_momentum a step; with alpha 0 no teacher then takes part.
    """

    gamma: NonNegative
    beta: NonNegative
    alpha: NonNegative
    distillation_temperature: Positive
    prior_strength: NonNegative
    contrast_encoder: Literal["teacher", "momentum"] = "teacher"
    encoder_momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    tau_g: Positive
    train_tau_g: bool
    queue_total: PositiveInt
    queue_minimum: PositiveInt
    projection_dim: PositiveInt

    @model_validator(mode="after")
    def _classifier_is_trained(self) -> StudentParams:
        if not (self.gamma or self.alpha):
            raise ValueError("gamma and alpha are both 0, so no term trains the classifier; set one of them above 0")
        return self


class EngineParams(Section):
    """How training runs. Nothing here changes the recipe; `precision` changes rounding, the rest not even that.

    precision: of the networks' convolutions and products; auto is bfloat16 on CUDA and float32 on the CPU. capture: a step
    as one CUDA graph, checked against the plain step before it is used. checkpoint_seconds: longest time between two
    checkpoints. checkpoint_activations: the backward pass computes each block again, which takes less memory and more
    time. tensorboard: event files under artifacts/tensorboard/ as well. side_by_side: how many of `seeds` train
    at once on the device; auto is one on the CPU, all on a GPU.
    """

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    capture: bool = True
    checkpoint_seconds: NonNegative = 60.0
    checkpoint_activations: bool = False
    tensorboard: bool = False
    side_by_side: PositiveInt | Literal["auto"] = "auto"
