"""Construction of L_cls, contrast terms and the objective of experts from params; checks of experts before training."""

from __future__ import annotations

import copy
import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.contrast.crd import CRD
from models.contrast.gml import TextCentres, UnitVectors
from models.contrast.kcl import KPositiveContrast, TargetedContrast
from models.contrast.memories import FifoQueue
from models.contrast.paco import GPaCo, PaCo
from models.contrast.proco import ProCo
from models.contrast.supcon import BalancedContrast, SupCon
from models.contrast.terms import ContrastTerm
from models.experts.backbone import SplitError, expert_backbone
from models.losses.class_loss import (
    ClassLoss,
    FocalLoss,
    LADELoss,
    LDAMLoss,
    SigmoidFocalLoss,
    SmoothingLoss,
    Weighting,
)
from models.networks.cosine_classifier import ImageClassifier
from models.networks.projection_head import ProjectionHead
from models.objectives.experts import BbnObjective, ExpertsObjective, Ncl, Reslt, Ride, Sade
from pipeline.data.class_prior import Prior
from pipeline.params import StudentParams, TrainingParams, method
from pipeline.params.experts import BbnParams, ExpertsParams, NclParams, ResltParams, RideParams
from pipeline.shared.artifacts import TEXT
from pipeline.shared.errors import ParamsError
from pipeline.text.stored import TextFeatures


def class_loss(section: TrainingParams, prior: Prior) -> ClassLoss:
    """L_cls of a section, in float32 on the CPU."""
    loss, strength, log_prior = section.loss, section.adjustment, torch.tensor(prior.in_losses)
    if isinstance(loss, method.LADELoss):
        return LADELoss(log_prior, strength, loss.weight, loss.regulariser)
    weighting = None
    if loss.class_balance is not None:
        weighting = Weighting(prior.counts, loss.class_balance, loss.after, loss.average)
    if isinstance(loss, method.FocalLoss):
        return FocalLoss(log_prior, strength, loss.gamma, weighting)
    if isinstance(loss, method.SigmoidFocalLoss):
        return SigmoidFocalLoss(log_prior, loss.gamma, weighting)
    if isinstance(loss, method.LDAMLoss):
        return LDAMLoss(log_prior, strength, prior.counts, 1 / section.tau_s, loss.margin, weighting)
    if isinstance(loss, method.SmoothingLoss):
        return SmoothingLoss(log_prior, strength, prior.counts, loss.head, loss.tail, weighting)
    return ClassLoss(log_prior, strength, weighting)


def contrast_term(
    section: StudentParams, prior: Prior, student_dim: int, teacher_dim: int, labels: Tensor | None = None
) -> ContrastTerm:
    """The contrast term of section.contrast with its heads; for every kind but gml.

    student_dim, teacher_dim: feature widths. labels: int64 [N] of the training images, which CRD needs; None: classes in
    order, which suffices to estimate memory. Raises ParamsError for labels of one class.
    """
    contrast, log_prior, dim = section.contrast, torch.tensor(prior.in_losses), section.projection_dim

    def head() -> ProjectionHead:
        return ProjectionHead(student_dim, section.projection_hidden or student_dim, dim)

    if isinstance(contrast, method.SupConContrast):
        return SupCon(head(), contrast.temperature, contrast.base_temperature)
    if isinstance(contrast, method.HybridContrast):
        return SupCon(head(), contrast.temperature)
    if isinstance(contrast, method.BCLContrast):
        return BalancedContrast(head(), head(), contrast.temperature)
    if isinstance(contrast, method.PaCoContrast):
        term = GPaCo if contrast.kind == "gpaco" else PaCo
        return term(head(), log_prior, FifoQueue(contrast.queue, dim), contrast.temperature, contrast.alpha)
    if isinstance(contrast, method.TSCContrast):
        if importlib.util.find_spec("scipy") is None:
            raise ParamsError(
                "student.contrast.kind is tsc, which needs scipy; run `pip install scipy`, or set another kind"
            )
        queue = FifoQueue(contrast.queue, dim)
        numbers = contrast.temperature, contrast.positives, contrast.target_weight
        return TargetedContrast(head(), queue, len(prior.classes), *numbers)
    if isinstance(contrast, method.KCLContrast):
        return KPositiveContrast(head(), FifoQueue(contrast.queue, dim), contrast.temperature, contrast.positives)
    if isinstance(contrast, method.ProCoContrast):
        return ProCo(head(), log_prior, dim, contrast.temperature)
    assert isinstance(contrast, method.CRDContrast)
    if labels is None:
        # On the CPU also within torch.device("meta"): CRD reads the numbers.
        counts = torch.tensor(prior.counts, device="cpu")
        labels = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
    try:
        return CRD(
            student_dim, teacher_dim, labels, dim=dim, negatives=contrast.negatives, temperature=contrast.temperature,
            rate=contrast.rate,
        )  # fmt: skip
    except ValueError as error:
        raise ParamsError(f"student.contrast.kind is crd, but {error}") from None


def text_centres(section: StudentParams, prior: Prior, width: int, text: TextFeatures | None) -> TextCentres:
    """The term of text features, for section.contrast_encoder text and teacher_and_text.

    width: of the image features. text: None: one row per class, of the same width, which suffices to estimate memory. Raises
    ParamsError if section.contrast.centres is raw and the widths differ.
    """
    contrast, classes, hidden = section.contrast, len(prior.classes), section.projection_hidden
    assert isinstance(contrast, method.GMLContrast)
    # On the CPU also within torch.device("meta"): the term reads the classes of the rows.
    rows, row_class = torch.ones(classes, width), torch.arange(classes, device="cpu")
    if text is not None:
        rows, row_class = torch.from_numpy(text.features), torch.from_numpy(text.row_class)
    if contrast.sentences == "mean":
        rows, row_class = class_means(rows, row_class, classes), torch.arange(classes, device="cpu")
    if contrast.centres == "raw":
        if rows.shape[1] != width:
            raise ParamsError(
                f"student.contrast.centres is raw, but the text features of {TEXT} have {rows.shape[1]} values and the image "
                f"features {width}; expected image and text encoder of one space, or student.contrast.centres: trained"
            )
        heads: tuple[nn.Module, nn.Module] = UnitVectors(), UnitVectors()
    else:
        query_head = ProjectionHead(width, hidden or width, section.projection_dim)
        equal = rows.shape[1] == width  # of equal widths, such as CLIP's, the heads start equal
        other = rows.shape[1], hidden or rows.shape[1], section.projection_dim
        heads = query_head, copy.deepcopy(query_head) if equal else ProjectionHead(*other)
    return TextCentres(
        *heads,
        rows,
        row_class,
        torch.tensor(prior.in_losses),
        section.tau_g,
        section.train_tau_g,
        section.prior_strength,
    )


def class_means(rows: Tensor, row_class: Tensor, classes: int) -> Tensor:
    """Mean direction of the rows [N,D] of each class: unit vectors [C,D]."""
    return F.normalize(rows.new_zeros(classes, rows.shape[1]).index_add(0, row_class, rows), dim=1)


def experts_objective(
    section: ExpertsParams, prior: Prior, model: ImageClassifier, loss: ClassLoss
) -> ExpertsObjective | BbnObjective:
    """The objective of student.experts for a network with an ExpertBackbone. loss: student.loss, used by RIDE."""
    if isinstance(section, BbnParams):
        return BbnObjective(model, section.power)
    log_prior = torch.tensor(prior.in_losses)
    if isinstance(section, RideParams):
        return ExpertsObjective(model, Ride(loss, section.reweight, section.diversity))
    if isinstance(section, NclParams):
        hard_classes = max(2, round(section.hard_share * len(prior.classes)))
        log_counts = log_prior + math.log(sum(prior.counts))
        return ExpertsObjective(model, Ncl(log_counts, hard_classes, section.divergence))
    if isinstance(section, ResltParams):
        return ExpertsObjective(model, Reslt(torch.tensor(prior.counts), section.leave_out, section.beta))
    return ExpertsObjective(model, Sade(log_prior, section.strength))


def check_experts(student: StudentParams, prior: Prior) -> None:
    """Raise ParamsError when student.backbone cannot be split, or student.experts does not fit the number of classes."""
    section, classes = student.experts, len(prior.classes)
    if section is None:
        return
    try:
        with torch.device("meta"):
            expert_backbone(student.backbone, 1, section.shared, section.narrow)
    except SplitError as error:
        raise ParamsError(f"student.backbone: {error}, or student.experts.kind: ncl") from None
    if isinstance(section, ResltParams) and round(section.leave_out[1] * classes) >= classes:
        raise ParamsError(
            f"student.experts.leave_out is {section.leave_out}, which leaves no class of {classes} to the third branch; "
            "lower the second share"
        )
