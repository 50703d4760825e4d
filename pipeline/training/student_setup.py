"""Construction of the student's objective and loss weights from params."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.contrast.gml import TextCentres, UnitVectors
from models.contrast.supcon import BalancedContrast, SupCon
from models.networks.adapters import feature_backbone, with_encoder
from models.networks.backbones import Backbone
from models.networks.cosine_classifier import CosineClassifier, ImageClassifier
from models.networks.tuning import TunedBackbone, TuneError, Tuning
from models.objectives.concutmix import ConCutMixObjective
from models.objectives.contrast import ContrastObjective
from models.objectives.hybrid import HybridObjective
from models.objectives.objective import Objective
from models.objectives.student import StudentObjective
from models.objectives.student_weights import StudentWeights
from pipeline.data.class_prior import Prior
from pipeline.data.dataset import AnyImages
from pipeline.data.split_tables import read_split
from pipeline.model_io.checkpoint import ModelConfig, build_model, check_encoder, check_image, load_model
from pipeline.model_io.encoder import build_on_meta, describe, load_encoder
from pipeline.model_io.inference import accuracy
from pipeline.model_io.pretrained import load_pretrained
from pipeline.params import EncoderParams, ImageParams, StudentParams
from pipeline.params.method import ConCutMixContrast
from pipeline.shared.artifacts import TEXT
from pipeline.shared.errors import ParamsError
from pipeline.text.stored import TextFeatures, load_text_features
from pipeline.training.method_setup import class_loss, class_means, contrast_term, experts_objective, text_centres


def build_objective(
    section: StudentParams,
    image: ImageParams,
    config: ModelConfig,
    prior: Prior,
    seed: int,
    teacher: Path,
    encoder: EncoderParams | None = None,
    start: dict[str, Tensor] | None = None,
) -> Objective:
    """Build the student's objective from the stage's seed. start: weights of the backbone from a pretraining.

    The teacher is loaded from its folder if a loss term needs it. A student that tunes the encoder takes images. Its
    teacher then takes images too, with the frozen encoder. Raises ParamsError when section.tune cannot tune the encoder.
    """
    weights, frozen, teacher_adjustment = weights_of(section), None, None
    pretrained = load_encoder(encoder, image).network if encoder and section.tune != "none" else None
    if weights.needs_teacher(section.contrast_encoder):
        frozen, trained = load_model(teacher, "teacher")
        check_image(trained, image, teacher)
        check_encoder(trained, config.encoder, teacher)
        teacher_adjustment = (
            _of_logits(trained.adjustment) - _of_logits(section.assumed_adjustment) + section.adjustment
        )
        if pretrained:
            frozen.backbone = with_encoder(pretrained, frozen.backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Built without the encoder; tuned_backbone adds it with its pretrained weights.
        model = build_model(replace(config, tune="none"), "student.backbone")
        load_pretrained(model.backbone, section.pretrained, "student.pretrained")
        if start is not None:
            model.backbone.load_state_dict(start)
        if pretrained:
            model.backbone = tuned_backbone(pretrained, model.backbone, section)
        labels = training_labels() if section.beta and section.contrast.kind == "crd" else None
        text = load_text_features(TEXT, prior.classes) if section.uses_text else None
        return student_objective(section, weights, prior, model, frozen, teacher_adjustment, labels, text)


def training_labels() -> Tensor:
    """Labels int64 [N] of the training split, in the order of its images."""
    return torch.from_numpy(read_split("train", ["label"]).column("label").to_numpy().astype(np.int64))


def _of_logits(adjustment: float | None) -> float:
    """The adjustment whose L_cls gives the same logits; None, balanced logits, is that of Eq. 6."""
    return 1.0 if adjustment is None else adjustment


def tuned_backbone(pretrained: Backbone, head: Backbone, section: StudentParams) -> TunedBackbone:
    """Build a student's backbone from a copy of the pretrained encoder, which section.tune trains, and the head."""
    tuning = Tuning(section.tune, section.tune_blocks, section.tune_rank, section.tune_rate, section.tune_decay)
    try:
        return TunedBackbone(copy.deepcopy(pretrained), head, tuning)
    except TuneError as error:
        raise ParamsError(f"student.tune is {section.tune}, but {error}") from None


def check_tuning(encoder: EncoderParams | None, section: StudentParams) -> None:
    """Raise ParamsError when section.tune cannot tune the encoder. Called before the teacher is trained."""
    if encoder and section.tune != "none":
        network = build_on_meta(describe(encoder).model)
        with torch.device("meta"):
            tuned_backbone(network, feature_backbone(network.feature_dim, 0), section)


def student_objective(
    section: StudentParams,
    weights: StudentWeights,
    prior: Prior,
    model: ImageClassifier,
    teacher: ImageClassifier | None,
    teacher_adjustment: float | None = None,
    labels: Tensor | None = None,
    text: TextFeatures | None = None,
) -> Objective:
    """The objective of params.student for a network and its teacher.

    teacher_adjustment: of the teacher's L_cls. labels: as in `contrast_term`. text: as in `text_centres`.
    """
    prior = prior.sampled(section.sampling)
    loss = class_loss(section, prior)
    loss.start(model.classifier)
    if section.experts:
        return experts_objective(section.experts, prior, model, loss)
    centres = text_centres(section, prior, model.feature_dim, text) if section.uses_text else None
    if section.beta and (section.contrast.kind != "gml" or section.contrast_encoder == "text"):
        width = model.feature_dim if teacher is None else teacher.feature_dim
        term = centres or contrast_term(section, prior, model.feature_dim, width, labels)
        if section.draws_balanced_batch:
            assert isinstance(term, SupCon)
            return HybridObjective(model, term, loss, section.gamma, section.beta)
        if isinstance(section.contrast, ConCutMixContrast):
            assert isinstance(term, BalancedContrast)
            return ConCutMixObjective(
                model, torch.tensor(prior.in_losses), weights, term,
                log_counts=torch.tensor(prior.counts).clamp(min=1).log(), blend=section.contrast.blend,
                nearest=section.contrast.nearest, warm=section.contrast.warm,
            )  # fmt: skip
        return ContrastObjective(
            model, teacher, torch.tensor(prior.in_losses), weights, term,
            encoder_momentum=section.encoder_momentum, teacher_adjustment=teacher_adjustment, loss=loss,
        )  # fmt: skip
    return StudentObjective(
        model,
        teacher,
        torch.tensor(prior.in_losses),
        prior.counts,
        weights,
        tau_g=section.tau_g,
        train_tau_g=section.train_tau_g,
        queue_total=section.queue_total,
        queue_minimum=section.queue_minimum,
        projection_dim=section.projection_dim,
        projection_hidden=section.projection_hidden,
        contrast_encoder=section.contrast_encoder,
        encoder_momentum=section.encoder_momentum,
        teacher_adjustment=teacher_adjustment,
        loss=loss,
        text=centres,
    )


def zero_shot(objective: Objective, validation: AnyImages, image: ImageParams, device: torch.device) -> float | None:
    """Accuracy on validation of the untrained network with the mean text feature of each class as its classifier.

    None unless student.contrast.centres is raw, that is, image and text features have one space.
    """
    centres = getattr(objective, "text", None) or getattr(objective, "term", None)
    if not (isinstance(centres, TextCentres) and isinstance(centres.query_head, UnitVectors) and len(validation)):
        return None
    with torch.random.fork_rng(devices=[]):
        means = class_means(centres.features, centres.row_class, objective.model.classes)
        model = copy.deepcopy(objective.model).to(device)
        model.classifier = CosineClassifier(means.shape[1], len(means)).to(device)
        model.classifier.weight.data.copy_(means)
    return accuracy(model, validation, image, device)


def weights_of(section: StudentParams) -> StudentWeights:
    """Weights of the student's loss terms from params."""
    return StudentWeights(
        section.gamma,
        section.beta,
        section.alpha,
        section.distillation_temperature,
        section.prior_strength,
        section.adjustment,
    )
