"""Parts of sections `teacher` and `student` of params.yaml that are chosen by `kind`: L_cls, classifier, contrast term."""

from __future__ import annotations

import operator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.params.section import Count, NonNegative, Number, Positive, PositiveInt, Section, Share

TEXT = ("text", "teacher_and_text")  # values of student.contrast_encoder that use text features
BelowOne = Annotated[Number, Field(gt=0, lt=1)]


class WeightedLoss(Section):
    """Class weights of a loss, as 1 / effective number of images (Cui et al. 2019).

    class_balance: beta of the effective number; null: no weights. after: share of the epochs before the weights apply
    (deferred re-weighting); 0: from the start. average: `batch` divides by the number of images, `weights` by the sum of
    their weights, as PyTorch and the published codes of deferred re-weighting do.
    """

    class_balance: BelowOne | None = None
    after: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    average: Literal["batch", "weights"] = "batch"


class CrossEntropyLoss(WeightedLoss):
    """Cross-entropy of logits + adjustment · log prior."""

    kind: Literal["cross_entropy"] = "cross_entropy"


class FocalLoss(WeightedLoss):
    """Focal loss of the softmax probability with exponent gamma (Lin et al. 2017)."""

    kind: Literal["focal"]
    gamma: NonNegative = 1.0


class SigmoidFocalLoss(WeightedLoss):
    """Sigmoid focal loss; with class_balance the class-balanced focal loss of Cui et al. 2019."""

    kind: Literal["sigmoid_focal"]
    gamma: NonNegative = 1.0


class LDAMLoss(WeightedLoss):
    """LDAM (Cao et al. 2019) for the cosine classifier. margin: of the class with the fewest images, as a cosine."""

    kind: Literal["ldam"]
    margin: Share = 0.5


class SmoothingLoss(WeightedLoss):
    """Label smoothing: `head` of the class with the most images, `tail` of the one with the fewest (MiSLAS); equal: plain."""

    kind: Literal["smoothing"]
    head: Share = 0.1
    tail: Share = 0.1


class LADELoss(Section):
    """LADE (Hong et al. 2021): cross-entropy + weight · R of the whole batch. regulariser: lambda of R."""

    kind: Literal["lade"]
    weight: NonNegative = 0.1
    regulariser: NonNegative = 0.01


Loss = Annotated[
    CrossEntropyLoss | FocalLoss | SigmoidFocalLoss | LDAMLoss | SmoothingLoss | LADELoss, Field(discriminator="kind")
]


class CosineHead(Section):
    """Cosine classifier with the temperature tau_s."""

    kind: Literal["cosine"] = "cosine"


class LinearHead(Section):
    """Linear classifier with bias; tau_s has no effect."""

    kind: Literal["linear"]


class CausalHead(Section):
    """Causal classifier, TDE (Tang et al. 2020); tau_s has no effect.

    heads: parts of the feature that are normalised on their own. alpha: how much of the mean direction is removed after
    training. momentum: of the running mean of the features.
    """

    kind: Literal["causal"]
    heads: PositiveInt = 2
    alpha: NonNegative = 1.5
    momentum: BelowOne = 0.9


Head = Annotated[CosineHead | LinearHead | CausalHead, Field(discriminator="kind")]


class GMLContrast(Section):
    """L_GML and L_tau of the paper, with the keys of section student.

    centres, sentences: of text features (contrast_encoder text, teacher_and_text). centres: `trained` embeds the text
    features by a key head; `raw` compares the image features with them as they are, for image and text encoder of one space.
    sentences: `all` is a mixture of one Gaussian per sentence, `mean` one Gaussian per class.
    """

    kind: Literal["gml"] = "gml"
    centres: Literal["trained", "raw"] = "trained"
    sentences: Literal["all", "mean"] = "all"
    encoders: ClassVar = ("teacher", "momentum", "self", "text", "teacher_and_text")  # self: of task segmentation


class SupConContrast(Section):
    """SupCon (Khosla et al. 2020) on two query views.

    base_temperature: the loss is multiplied by temperature / base_temperature, as in the authors' code; null: by 1.
    """

    kind: Literal["supcon"]
    encoders: ClassVar = ("self",)
    temperature: Positive = 0.1
    base_temperature: Positive | None = None


class BCLContrast(Section):
    """Balanced contrastive learning (Zhu et al. 2022) on two query views, with one centre per class from its weights."""

    kind: Literal["bcl"]
    encoders: ClassVar = ("self",)
    temperature: Positive = 0.1


class ConCutMixContrast(BCLContrast):
    """ConCutMix (Pan et al. 2024): BCL; the classifier view is mixed with images of equally likely classes by CutMix.

    The distances to the `nearest` class centres have the share blend * log n / sum of log n over the classes in the label of
    an image of a class of n images, so that many classes need a larger blend. warm: share of the epochs without it.
    """

    kind: Literal["concutmix"]  # type: ignore[assignment]
    blend: NonNegative = 0.0784  # 20 / 255
    nearest: PositiveInt = 30
    warm: Share = 0.5


class PaCoContrast(Section):
    """PaCo (Cui et al. 2021): class logits, batch and queue are the candidates. It trains the classifier too.

    alpha: weight of a feature of the own class. queue: number of stored keys, at least batch_size.
    """

    kind: Literal["paco"]
    encoders: ClassVar = ("momentum",)
    temperature: Positive = 0.05
    alpha: NonNegative = 0.05
    queue: PositiveInt = 1024


class GPaCoContrast(PaCoContrast):
    """GPaCo (Cui et al. 2023): PaCo on two query views, without a momentum encoder."""

    kind: Literal["gpaco"]  # type: ignore[assignment]
    encoders: ClassVar = ("self",)


class KCLContrast(Section):
    """K-positive contrastive loss (Kang et al. 2021).

    positives: keys of the own class that are used. queue: number of stored keys, at least batch_size.
    """

    kind: Literal["kcl"]
    encoders: ClassVar = ("momentum",)
    temperature: Positive = 0.07
    positives: Count = 6
    queue: PositiveInt = 4096


class TSCContrast(KCLContrast):
    """Targeted contrast (Li et al. 2022): KCL with a fixed target for each class. target_weight: weight of the own target."""

    kind: Literal["tsc"]  # type: ignore[assignment]
    target_weight: NonNegative = 0.2


class HybridContrast(Section):
    """Hybrid-SC (Wang et al. 2021): SupCon of two query views, then more and more L_cls of a second, class-balanced batch."""

    kind: Literal["hybrid_sc"]
    encoders: ClassVar = ("self",)
    temperature: Positive = 0.1


class ProCoContrast(Section):
    """Probabilistic contrastive learning (Du et al. 2024) on two query views: each class is a von Mises-Fisher distribution."""

    kind: Literal["proco"]
    encoders: ClassVar = ("self",)
    temperature: Positive = 0.1


class CRDContrast(Section):
    """Contrastive representation distillation (Tian et al. 2020): the student's feature against the teacher's.

    negatives: images of other classes for each image. rate: share of the old row when a row of the memory is updated.
    """

    kind: Literal["crd"]
    encoders: ClassVar = ("teacher",)
    temperature: Positive = 0.07
    negatives: PositiveInt = 16384
    rate: Share = 0.5


Contrast = Annotated[
    GMLContrast
    | SupConContrast
    | BCLContrast
    | ConCutMixContrast
    | PaCoContrast
    | GPaCoContrast
    | KCLContrast
    | TSCContrast
    | HybridContrast
    | ProCoContrast
    | CRDContrast,
    Field(discriminator="kind"),
]


def check_loss(loss: Loss, head: Head, adjustment: float, accumulate: int, mix: str) -> None:
    """Raise ValueError for a loss that does not fit the other keys of its section."""
    if loss.kind == "ldam" and head.kind != "cosine":
        raise ValueError(
            f"loss.kind is ldam, whose margins are cosines, but classifier.kind is {head.kind}; set it to cosine"
        )
    if adjustment and (loss.kind == "sigmoid_focal" or weighted(loss)):
        reason = (
            "has no logit adjustment" if loss.kind == "sigmoid_focal" else "has class weights, which balance it too"
        )
        raise ValueError(f"adjustment is {adjustment:g}, but loss.kind {loss.kind} {reason}; set adjustment: 0.0")
    if loss.kind == "lade" and accumulate > 1:
        raise ValueError(
            f"accumulate is {accumulate}, but loss.kind lade has a term of the whole batch; set accumulate: 1 and lower "
            "batch_size if the batch does not fit"
        )
    if loss.kind == "lade" and mix != "none":
        raise ValueError(
            f"augment.mix is {mix}, but loss.kind lade needs one label per image; set it to none, or take another loss"
        )
    if isinstance(loss, WeightedLoss) and loss.average == "weights" and accumulate > 1:
        raise ValueError(
            f"accumulate is {accumulate}, but loss.average is weights, a sum over the whole batch; set loss.average: batch"
        )


def weighted(loss: Loss) -> bool:
    """Whether the loss has class weights, so that its logits are balanced as they are."""
    return isinstance(loss, WeightedLoss) and loss.class_balance is not None


def check_contrast(contrast: Contrast, student: Any) -> None:
    """Raise ValueError for a contrast term that does not fit the other keys of section student."""
    kind, encoder, mix = contrast.kind, student.contrast_encoder, student.augment.mix
    if encoder not in contrast.encoders:
        raise ValueError(
            f"contrast_encoder is {encoder}, but contrast.kind {kind} takes {' or '.join(contrast.encoders)}; set "
            f"contrast_encoder: {contrast.encoders[0]}"
        )
    if isinstance(contrast, GMLContrast):
        if contrast != GMLContrast() and encoder not in TEXT:
            raise ValueError(
                f"contrast.centres is {contrast.centres} and contrast.sentences is {contrast.sentences}, but contrast_encoder "
                f"is {encoder}, without text features; set contrast_encoder to {' or '.join(TEXT)}, or contrast: {{kind: gml}}"
            )
        return
    if student.accumulate > 1:
        raise ValueError(
            f"accumulate is {student.accumulate}, but contrast.kind {kind} compares the whole batch; set accumulate: 1, and "
            "engine.checkpoint_activations: true or a smaller batch_size if the batch does not fit"
        )
    if kind in ("paco", "gpaco", "kcl", "tsc", "crd") and mix != "none":
        raise ValueError(
            f"augment.mix is {mix}, but contrast.kind {kind} compares the classifier view; set augment.mix: none"
        )
    if kind in ("paco", "gpaco") and student.assumed_adjustment != 1:
        raise ValueError(
            f"adjustment is {student.adjustment:g} and loss.kind is {student.loss.kind}, but contrast.kind {kind} adds the log "
            "prior to the class logits; set adjustment: 1.0 and loss: {kind: cross_entropy}"
        )
    if isinstance(contrast, PaCoContrast | KCLContrast) and contrast.queue < student.batch_size:
        raise ValueError(
            f"contrast.queue is {contrast.queue}, below batch_size {student.batch_size}; set it to {student.batch_size} or more"
        )
    if kind == "proco" and student.projection_dim < 3:
        raise ValueError(f"projection_dim is {student.projection_dim}; contrast.kind proco needs at least 3")


def check_second_batch(contrast: Contrast, student: Any) -> None:
    """Raise ValueError for keys of section student that do not fit a contrast.kind with a second, class-balanced batch."""
    unfit = {"alpha": (0.0, "0.0"), "augment.mix": ("none", "none")}
    if contrast.kind == "hybrid_sc":
        unfit["adjustment"] = (0.0, "0.0")
        if student.loss.kind == "lade" or weighted(student.loss):
            prior = "has class weights" if weighted(student.loss) else "has the class prior"
            raise ValueError(
                f"loss.kind {student.loss.kind} {prior}, but contrast.kind is hybrid_sc, whose L_cls has a class-balanced "
                "batch; set loss: {kind: cross_entropy}"
            )
    elif contrast.kind == "concutmix":
        if student.loss != CrossEntropyLoss():
            raise ValueError(
                f"loss.kind is {student.loss.kind}, but contrast.kind is concutmix, which has its own cross-entropy; set loss: "
                "{kind: cross_entropy}"
            )
        if student.backbone == "encoder":
            raise ValueError(
                "backbone is encoder, but contrast.kind is concutmix, which cuts images and not stored features; set another "
                "kind"
            )
    else:
        return
    for key, (expected, allowed) in unfit.items():
        value = operator.attrgetter(key)(student)
        if value != expected:
            raise ValueError(
                f"{key} is {value}, but contrast.kind is {contrast.kind}, which draws a second, class-balanced batch; "
                f"set {key}: {allowed}"
            )
