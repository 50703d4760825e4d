"""Sections `teacher`, `student` and `engine` of params.yaml: networks, losses, optimisation, augmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.params.experts import ExpertsParams, check_experts
from pipeline.params.method import (
    TEXT,
    Contrast,
    CosineHead,
    CrossEntropyLoss,
    GMLContrast,
    Head,
    Loss,
    check_contrast,
    check_loss,
    check_second_batch,
    weighted,
)
from pipeline.params.section import Count, NonNegative, Number, Positive, PositiveInt, Section, Share


class LearningRateParams(Section):
    """Learning rate schedule: `cosine` to nearly zero, or `steps`, times `factor` at each milestone; linear warm-up.

    `poly`, of task segmentation, changes with every step: (rate - minimum) * (1 - step/steps)^power + minimum.

    rule: `official` is that of the authors' code: warm-up and steps end an epoch later, and a cosine starts after
    warm-up.
    """

    kind: Literal["cosine", "steps", "poly"]
    rule: Literal["paper", "official"] = "paper"
    warmup_epochs: Count
    milestones: list[PositiveInt] = []
    factor: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    minimum: NonNegative = 1e-4
    power: Positive = 0.9

    @model_validator(mode="after")
    def _milestones_belong_to_steps(self) -> LearningRateParams:
        if self.kind == "steps" and self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones is {self.milestones}; expected epochs in rising order")
        if self.kind != "steps" and self.milestones:
            raise ValueError(f"milestones is set but kind is {self.kind}; expected kind: steps, or no milestones")
        return self


class AugmentParams(Section):
    """Augmentation of each view, in this order: crop, flip, policy, Cutout; then the mix of the classifier view.

    mix: CutMix or mixup. crop: `pad` adds crop_padding pixels of colour fill on each side of the test view; `resized` resizes a
    box with crop_scale of the original image's area. contrast_policy: policy of the query and key views. randaugment,
    simaugment and stacked (both, with grey and blur before RandAugment) start with colour jitter of strength `jitter`.
    simaugment always crops `resized` and has no Cutout. fill: colour, in levels of red, green and blue, of the padding and of
    the Cutout square; black in the papers. bicubic: resampling of the authors' code, where a shear of
    autoaugment is bicubic instead of nearest, and a translation of randaugment is bicubic instead of bilinear half of
    the time.
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
    fill: Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)] = [0, 0, 0]
    mix: Literal["none", "cutmix", "mixup"] = "none"
    mix_alpha: Positive = 1.0

    def equal_views(self, query_views: bool) -> bool:
        """Whether all views of an image are equal. query_views: without the classifier view, those with contrast_policy."""
        crops = self.crop_padding > 0 if self.crop == "pad" else self.crop_scale[0] < 1
        contrast = self.policy if self.contrast_policy == "same" else self.contrast_policy
        policies = {contrast} if query_views else {contrast, self.policy}
        return policies == {"none"} and not (crops or self.flip or self.cutout)

    @model_validator(mode="after")
    def _scale_rises(self) -> AugmentParams:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale is {self.crop_scale}; expected the smaller share of the area first")
        return self

    @model_validator(mode="after")
    def _some_view_takes_cutout(self) -> AugmentParams:
        if self.cutout and self.policy == "simaugment" and self.contrast_policy in ("same", "simaugment"):
            raise ValueError(f"cutout is {self.cutout}, but every view is simaugment with no Cutout; set it to 0")
        return self


class PretrainedParams(Section):
    """Pretrained weights: a local safetensors file with the names of the backbone's library, and its checked sha256."""

    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TrainingParams(Section):
    """Params shared by teacher and student training: network, optimiser, schedule, augmentation.

    adjustment: strength of the logit adjustment in L_cls; 1 is Eq. 6, 0 plain cross-entropy. Evaluation and export add
    the difference, so that `balanced` and `train` mean the same for every strength. loss: L_cls by name (docs/methods.md).
    classifier: the classifier by name; of all but `cosine`, tau_s has no effect. ema_decay: decay of the moving
    average of weights, which is evaluated and saved instead of the last step's weights; 0 for none. accumulate: number
    of parts of a batch (gradient accumulation), for batches that do not fit into the device's memory. pretrained:
    initial weights. backbone: `encoder` stands for the stored features of section encoder. adapter: hidden units of a
    residual adapter on these features; 0 for none. momentum: momentum of sgd, or first beta of adamw (the second beta is
    0.999). gradient_clip: largest norm of the gradient of a step; 0 for no limit.
    """

    backbone: str
    pretrained: PretrainedParams | None = None
    adapter: Count = 0
    tau_s: Positive
    adjustment: NonNegative = 1.0
    loss: Loss = CrossEntropyLoss()
    classifier: Head = CosineHead()
    ema_decay: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    epochs: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]
    accumulate: PositiveInt = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive
    momentum: Annotated[Number, Field(ge=0, lt=1)]
    weight_decay: NonNegative
    gradient_clip: NonNegative = 0.0
    schedule: LearningRateParams
    augment: AugmentParams

    @model_validator(mode="after")
    def _loss_fits(self) -> TrainingParams:
        check_loss(self.loss, self.classifier, self.adjustment, self.accumulate, self.augment.mix)
        return self

    @property
    def assumed_adjustment(self) -> float | None:
        """Adjustment of the trained network's logits; None: they are balanced, by class weights (Prior.balanced_shift)."""
        return None if weighted(self.loss) else self.adjustment


class MemoryParams(Section):
    """Memory of training features as a classifier, on the features of a frozen encoder (docs/encoders.md).

    classifier: `both` adds the logits of the memory to those of the trained cosine classifier; `memory` uses the memory
    alone, and nothing is trained. rows: largest number of rows; classes with more images store means of clusters. null
    stands for 64 MiB of rows.
    """

    classifier: Literal["both", "memory"] = "both"
    rows: PositiveInt | None = None


class StudentParams(TrainingParams):
    """Params of the student: the loss gamma·L_cls + beta·(L_GML + L_tau) + alpha·L_KD, and the class-wise queues.

    A term of weight 0 is not computed. contrast: the term of weight beta (docs/contrast-terms.md). contrast_encoder: the
    encoder that gives the keys, the frozen `teacher` or a `momentum` copy of the student, updated with encoder_momentum in
    each step; with `momentum` and alpha 0 no teacher is used. `self`: the student, for terms whose views all carry
    gradients, and for task segmentation. `text`: the features of stage embed_text, constant and without queue;
    `teacher_and_text`: the sum of both terms (docs/text-centres.md). prior_strength, tau_g and train_tau_g are used by `gml`
    alone, as are the queues. projection_hidden: hidden units of the projection heads, which in `gml` embed all queue_total
    rows in each step; null: the feature width. memory: null for no memory.

    tune: `none` trains on the stored features of section encoder. `last_blocks` trains the last tune_blocks blocks of
    the encoder, `lora` a low-rank update (rank tune_rank) of its linear layers and convolutions, `adaptformer` an
    adapter (tune_rank hidden units) in each transformer block, `all` the whole encoder; the student then takes images,
    and the teacher stays on the frozen encoder. tune_rate: learning rate of the encoder's last block as a multiple of
    learning_rate. tune_decay: each earlier block has tune_decay times the rate of the block after it.

    sampling: the images of an epoch are drawn with replacement, a class with a probability in proportion to (its number of
    images) ** sampling, and the losses use the log of these probabilities as prior. 0.5: square-root sampling; 1: each image
    once in an epoch.

    experts: a network with several experts and its loss, in place of the terms above; null for one network.

    pretraining: `rotation` first trains the backbone to recognise rotations of the images, with the same epochs, schedule and
    augmentation but without mixed images (SSP).
    """

    gamma: NonNegative
    beta: NonNegative
    alpha: NonNegative
    distillation_temperature: Positive
    prior_strength: NonNegative
    contrast: Contrast = GMLContrast()
    contrast_encoder: Literal["teacher", "momentum", "self", "text", "teacher_and_text"] = "teacher"
    encoder_momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    tau_g: Positive
    train_tau_g: bool
    queue_total: PositiveInt
    queue_minimum: PositiveInt
    projection_dim: PositiveInt
    projection_hidden: PositiveInt | None = None
    memory: MemoryParams | None = None
    experts: ExpertsParams | None = None
    tune: Literal["none", "last_blocks", "lora", "adaptformer", "all"] = "none"
    tune_blocks: PositiveInt = 2
    tune_rank: PositiveInt = 8
    tune_rate: Positive = 0.1
    tune_decay: Annotated[Number, Field(gt=0, le=1)] = 1.0
    sampling: Share = 1.0
    pretraining: Literal["none", "rotation"] = "none"

    @property
    def uses_text(self) -> bool:
        """Whether a term compares with text features."""
        return self.beta > 0 and self.contrast_encoder in TEXT

    @property
    def trains_classifier(self) -> bool:
        """Whether a term trains the classifier."""
        return bool(self.gamma or self.alpha or (self.beta and self.contrast.kind in ("paco", "gpaco")))

    @model_validator(mode="after")
    def _contrast_fits(self) -> StudentParams:
        if self.beta:
            check_contrast(self.contrast, self)
            check_second_batch(self.contrast, self)
        return self

    @property
    def draws_balanced_batch(self) -> bool:
        """Whether L_cls has a class-balanced batch of its own (Hybrid-SC), so that the logits are balanced."""
        return self.beta > 0 and self.contrast.kind == "hybrid_sc"

    @property
    def draws_second_batch(self) -> bool:
        """Whether a step draws a second batch with other class shares."""
        balanced = self.beta > 0 and self.contrast.kind in ("hybrid_sc", "concutmix")
        return balanced or (self.experts is not None and self.experts.kind == "bbn")

    @property
    def compares_views(self) -> bool:
        """Whether a term other than GML compares two views of an image, which must differ."""
        return self.beta > 0 and self.contrast.kind not in ("gml", "crd")

    @model_validator(mode="after")
    def _memory_has_the_frozen_features(self) -> StudentParams:
        if self.tune != "none" and self.memory:
            raise ValueError(
                f"memory is set, but tune is {self.tune}, and a memory holds features of a frozen encoder; set memory: null"
            )
        return self

    @model_validator(mode="after")
    def _tuned_encoder_has_a_frozen_teacher(self) -> StudentParams:
        if self.tune != "none" and self.contrast_encoder == "momentum":
            raise ValueError(
                f"contrast_encoder is momentum, but tune is {self.tune}, where the frozen encoder fills the queues; expected "
                "contrast_encoder: teacher"
            )
        return self

    @model_validator(mode="after")
    def _sampling_fits(self) -> StudentParams:
        if self.sampling != 1 and (self.adjustment != 1 or self.experts):
            raise ValueError(
                f"sampling is {self.sampling:g}, but adjustment is {self.adjustment:g} and experts is "
                f"{self.experts.kind if self.experts else 'null'}; expected adjustment: 1.0 and experts: null, or sampling: 1.0"
            )
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> StudentParams:
        if self.experts:
            check_experts(self.experts, self)
        return self

    @model_validator(mode="after")
    def _pretraining_fits(self) -> StudentParams:
        if self.pretraining == "none":
            return self
        problem = f"pretraining is {self.pretraining}, but "
        for key, expected in {"pretrained": None, "experts": None, "memory": None, "tune": "none"}.items():
            if getattr(self, key) != expected:
                allowed = "null" if expected is None else expected
                raise ValueError(f"{problem}{key} is set too; set {key}: {allowed}, or pretraining: none")
        if self.backbone == "encoder":
            raise ValueError(
                f"{problem}backbone is encoder, whose features are stored and not trained; set pretraining: none"
            )
        return self

    @property
    def assumed_adjustment(self) -> float | None:
        """As of TrainingParams; None also for experts whose papers use the logits as they are, and for another sampling."""
        balanced = (self.experts and self.experts.balanced) or self.sampling != 1 or self.draws_balanced_batch
        return None if balanced else super().assumed_adjustment


class EngineParams(Section):
    """Execution of training. No key changes the recipe; only `precision` changes rounding.

    precision: of convolutions and matrix products; auto is bfloat16 on CUDA and float32 on the CPU. capture: run a step
    as one CUDA graph, which is compared with the eager step before use. checkpoint_seconds: longest time between two
    checkpoints. checkpoint_activations: activation checkpointing, which recomputes each block in the backward pass;
    less memory, more time. tensorboard: also write event files under artifacts/tensorboard/. side_by_side: number of
    `seeds` that train at once on the device; auto is one on the CPU, all on a GPU.
    """

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    capture: bool = True
    checkpoint_seconds: NonNegative = 60.0
    checkpoint_activations: bool = False
    tensorboard: bool = False
    side_by_side: PositiveInt | Literal["auto"] = "auto"
