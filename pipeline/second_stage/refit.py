"""Refit the classifier of the trained student by the method of section `classifier`, and write the student with it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.networks.cosine_classifier import ImageClassifier, LinearClassifier, LinearHead, linear_head
from models.networks.memory_fit import DEFAULT_TAU, MINIMUM_IMAGES
from models.second_stage import methods
from models.second_stage.disalign import RHO
from models.second_stage.fitting import Fit, NotFiniteError, Recipe, TrainingFeatures
from models.second_stage.nearest_mean import nearest_mean
from pipeline.data.class_prior import Prior, load_prior
from pipeline.data.dataset import AnyImages
from pipeline.features.stored import evaluation_inputs
from pipeline.model_io.checkpoint import check_image, check_inputs, load_model, save_model
from pipeline.model_io.devices import choose_device
from pipeline.model_io.inference import EVALUATION_BATCH, divergence_named, outputs
from pipeline.params import ClassifierParams, ImageParams, Params
from pipeline.second_stage.features import shift_images, training_features
from pipeline.second_stage.held_out import HeldOut, normalised_head
from pipeline.shared.artifacts import whole_folder
from pipeline.shared.errors import ParamsError, StageError
from pipeline.shared.progress import progress_bar
from serving.shared.terminal import counted, print

OVERRIDES = ("epochs", "batch_size", "learning_rate", "weight_decay")
SCALE_IS_FITTED = ("ncm", "tau_norm", "los")  # these methods leave the scale of the logits open


def refit_student(params: Params, student: Path, output: Path) -> dict[str, Any]:
    """Write the student of folder `student` with a refitted classifier to `output`; returns the record of the second stage.

    tau and the scale of the logits are fitted on validation images. Raises ParamsError without a trained student, for a
    class without training images, and for a class without validation images to choose tau on; StageError for values that
    are not finite.
    """
    section, prior, seed = params.classifier, load_prior(), params.seed
    model, config = load_model(student, "student")
    check_image(config, params.image, student)
    validation = evaluation_inputs(params, "validation")["student"]
    check_inputs(config, getattr(validation, "encoder", None), student)
    check_classes(section, prior, validation.labels)
    if section.kind in SCALE_IS_FITTED and len(validation) < MINIMUM_IMAGES:
        print(
            f"classifier  warning: the scale of the logits is not fitted ({counted(len(validation), 'validation image')}, "
            f"fewer than {MINIMUM_IMAGES}); raise data.validation_per_class or data.validation_share",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    device = choose_device(params.device)
    model.to(device, memory_format=torch.channels_last)
    start = _student_head(model)
    with divergence_named(student, "student"):
        held = _held_out(model, validation, params.image, device)
    before = held.balanced_accuracy(start, prior.balanced_shift(config.adjustment))
    features, labels = training_features(model, params, student, seed)
    if not features.isfinite().all():
        raise StageError(
            f"{student}: features of training images are not finite in float16; run `dvc repro -f student`"
        )
    if section.shift_batch_norm:
        held = _held_out(model, validation, params.image, device)
    data = TrainingFeatures(features, labels, len(prior.classes))
    refit = _Refit(section, prior, data, held, seed, device)
    try:
        head, fitted = refit.run(start)
    except NotFiniteError as error:
        raise StageError(f"classifier: {error}; lower classifier.learning_rate") from None
    # What the loss leaves in the logits: DisAlign weights the classes by prior^-RHO, L_cls adds log prior. The others are used
    # as their papers use them: with all classes equally likely in training, or chosen for balanced accuracy.
    adjustment = {"disalign": RHO, "balanced_softmax": 1.0}.get(section.kind)
    after = held.balanced_accuracy(head, prior.balanced_shift(adjustment))
    record: dict[str, Any] = {
        "kind": section.kind, "start": section.start, "views": features.shape[1], **fitted,
        "fits": refit.fits, "shift_images": shift_images(len(labels)) if section.shift_batch_norm else 0,
        "validation_images": len(validation), "balanced_accuracy": {"before": before, "after": after},
    }  # fmt: skip
    model.classifier = head
    with whole_folder(output) as folder:
        save_model(model.state_dict(), replace(config, tau_s=1.0, adjustment=adjustment, second_stage=record), folder)
    return record


@dataclass(frozen=True)
class _Refit:
    """One method on the features of the training images; `run` returns the head, and the values fitted on validation images."""

    section: ClassifierParams
    prior: Prior
    data: TrainingFeatures
    held: HeldOut
    seed: int
    device: torch.device
    # Of each fit: steps, images of a batch, multiply-accumulates of a step.
    fits: list[dict[str, int]] = field(default_factory=list)

    def run(self, student: LinearHead) -> tuple[LinearHead, dict[str, float]]:
        fitted: dict[str, float] = {}
        if self.section.kind == "ncm":
            centre, weight, bias = nearest_mean(*self.data)
            # With few validation images, the scale of the GML loss: -|u - m|^2 / (2 tau) is cos / tau up to a constant.
            head = linear_head(weight / (2 * DEFAULT_TAU), bias / (2 * DEFAULT_TAU), centre)
        elif self.section.kind == "tau_norm":
            linear = self._linear("linear")
            fitted["tau"] = self.held.choose_tau(linear) if self.section.tau is None else self.section.tau
            head = normalised_head(linear, fitted["tau"])
        elif self.section.kind in ("crt", "balanced_softmax"):
            head = self._linear(self.section.kind)
        else:
            start = student if self.section.start == "student" else self._first_linear()
            head = self._trained(start)
        if self.section.kind in SCALE_IS_FITTED:
            fitted["scale"] = self.held.fit_scale(head)
            head = linear_head(fitted["scale"] * head.weight, fitted["scale"] * head.bias, head.centre)
        return head, fitted

    def _recipe(self, kind: str) -> Recipe:
        given = {key: getattr(self.section, key) for key in OVERRIDES}
        given = {key: value for key, value in given.items() if value is not None}
        return replace(methods.RECIPES[kind], **given, **({"least_steps": 0} if "epochs" in given else {}))

    def _linear(self, kind: str) -> LinearHead:
        log_prior = self._log_prior() if kind == "balanced_softmax" else None
        with self._fit(self._recipe(kind)) as how:
            return methods.train_linear(self.data, how, log_prior)

    def _first_linear(self) -> LinearHead:
        """Linear classifier to start from; its recipe is the method's own."""
        with self._fit(methods.RECIPES["linear"]) as how:
            return methods.train_linear(self.data, how)

    def _trained(self, start: LinearHead) -> LinearHead:
        with self._fit(self._recipe(self.section.kind)) as how:
            if self.section.kind == "mislas":
                return methods.train_mislas(
                    start, self.data, how, (self.section.smoothing[0], self.section.smoothing[1])
                )
            if self.section.kind == "disalign":
                return methods.train_disalign(start, self.data, how, self._log_prior())
            if self.section.kind == "balms":
                return methods.train_balms(start, self.data, how, self._log_prior())
            if self.section.kind == "los":
                held = len(self.held.labels) >= MINIMUM_IMAGES
                return methods.train_los(start, self.data, how, self._score if held else None)
            train = {"lws": methods.train_lws, "metasaug": methods.train_metasaug}
            return train[self.section.kind](start, self.data, how)

    def _score(self, head: LinearHead) -> float:
        return self.held.balanced_accuracy(head) or 0.0

    def _log_prior(self) -> Tensor:
        return torch.tensor(self.prior.in_losses, dtype=torch.float64)

    @contextlib.contextmanager
    def _fit(self, recipe: Recipe) -> Iterator[Fit]:
        """Context with a fit with a progress bar, recorded in `fits`; prints if its batches are smaller than the recipe's."""
        with progress_bar() as progress, contextlib.ExitStack() as first_step:
            bar = progress.add_task("classifier", total=None, rate="")
            counter = first_step.enter_context(FlopCounterMode(display=False))

            def watch(step: int, steps: int, batch: int) -> None:
                if step == 1:
                    first_step.close()
                    macs = counter.get_total_flops() // 2
                    self.fits.append({"steps": steps, "batch_size": batch, "step_macs": macs})
                progress.update(bar, completed=step, total=steps)

            yield Fit(recipe, self.seed, self.device, watch)
        if (batch := self.fits[-1]["batch_size"]) < recipe.batch_size:
            images = counted(len(self.data.labels), "training image")
            print(f"classifier  batches of {batch} images instead of {recipe.batch_size}, for {images}", flush=True)


def _student_head(model: ImageClassifier) -> LinearHead:
    """The student's classifier as a linear head of features of length 1, on the CPU.

    Of a linear classifier, the head has the logits of a feature of mean length; of a causal one, those of a feature whose
    parts have equal lengths.
    """
    folded = model.folded()
    assert folded is not None  # a second stage takes a student without a memory, and no second stage
    length = model.classifier.length.cpu() if isinstance(model.classifier, LinearClassifier) else folded.parts**0.5
    bias = torch.zeros(len(folded.matrix)) if folded.bias is None else folded.bias.cpu()
    return linear_head(folded.matrix.cpu() * length, bias)


def _held_out(model: ImageClassifier, validation: AnyImages, image: ImageParams, device: torch.device) -> HeldOut:
    """Features of the validation images."""
    if not len(validation):
        return HeldOut(torch.zeros(0, model.feature_dim), validation.labels)
    batches = validation.batches(torch.arange(len(validation)), EVALUATION_BATCH)
    return HeldOut(outputs(model, batches, image, device)[0], validation.labels)


def check_classes(section: ClassifierParams, prior: Prior, validation: Tensor) -> None:
    """Raise ParamsError for a class without the images that the method needs.

    validation: labels of the validation images, int64 [N].
    """
    if 0 in prior.counts:
        name = prior.classes[prior.counts.index(0)]
        raise ParamsError(
            f"classifier.kind is {section.kind}, but class {name!r} has no training images; add some or set kind: none"
        )
    held = torch.bincount(validation, minlength=len(prior.classes)).tolist()
    if section.kind == "tau_norm" and section.tau is None and 0 in held:
        raise ParamsError(
            f"classifier.tau is null, but class {prior.classes[held.index(0)]!r} has no validation images to choose it on "
            f"(such classes: {held.count(0)}); raise data.validation_per_class or data.validation_share, or set classifier.tau"
        )
