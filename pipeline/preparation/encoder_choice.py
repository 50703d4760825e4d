"""`tailor init`: choose a frozen encoder for a folder of images, or training from scratch. The rule: SIZES and below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.networks.encoders import Encoder, UnknownEncoderError, find_encoder
from pipeline.params import EncoderParams, ImageParams
from pipeline.params.recipe import RECIPES, flat, resolve
from pipeline.preparation.folder_summary import FolderSummary
from pipeline.shared.errors import ParamsError
from serving.shared.terminal import counted

if TYPE_CHECKING:
    import torch

    from pipeline.preparation.encoder_sample import SampleResult

Suggestions = dict[str, tuple[Any, str]]

RECIPE = "photographs-lite0.yaml"
DEFAULT = "efficientnet_lite0"  # `make install` installs its weights
# Rows (smallest side, image size, reason), by the median of the images' shorter sides in pixels; the last row that applies
# is used. `full`: the encoder's own size; `reduced`: the size in REDUCED; None: training from scratch. The bounds are a
# choice, not a measurement that the repository can repeat.
SIZES = (
    (0, None, "images below 32 pixels have no details of photographs"),
    (32, "reduced", "small images: the full size has three times as many pixels"),
    (64, "full", "the size of the pretraining"),
)
REDUCED = {"efficientnet_lite0": 128, "efficientnet_lite2": 128}  # of Lite0 a third of the pixels
LONGEST_MINUTES = 20  # limit for `embed` at the full size; above it the reduced size is used
# From this number of training images, a folder is trained from scratch if kNN on the features is not above chance.
MANY = 20_000
# Seconds of `dvc repro` besides `embed`, rough estimates. START_SECONDS: the start of ten stages, report and export.
# TRAINING_SECONDS: teacher and student, for each training image.
START_SECONDS, TRAINING_SECONDS = 100, 0.005
# From 8 * LARGE_EIGHTH training images the teacher's batch is LARGE_BATCH: half of the time at the same validation accuracy
# (docs/experiments-encoders.md, 2026-11-29). The student's stays: with an adapter its learning rate would be too high.
LARGE_EIGHTH, LARGE_BATCH = 2048, 512
WHY = "pretrained features need fewer images than training from scratch"


@dataclass(frozen=True)
class EncoderChoice:
    """The encoder of a project and the reason. encoder: None for training from scratch.

    size: image side in pixels. size_reason: reason for the size. sample: measurement of a sample; None without an encoder.
    seconds: estimated time of the first `dvc repro` on this machine.
    """

    encoder: Encoder | None
    reason: str
    size: int = 0
    size_reason: str = ""
    sample: SampleResult | None = None
    seconds: float = 0

    def estimate(self) -> dict[str, Any]:
        """Return the measured figures as JSON values."""
        if self.sample is None:
            return {}
        accuracy = self.sample.accuracy
        return {
            "minutes": round(self.seconds / 60, 1), "images_per_second": round(self.sample.images_per_second, 1),
            "accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high,
            "images": self.sample.images, "classes": self.sample.classes,
        }  # fmt: skip


def choose_encoder(summary: FolderSummary, name: str | None, device: torch.device) -> EncoderChoice:
    """Choose by the size and number of the images, the time of `embed` on this machine, and kNN on a sample's features.

    name: an encoder that the user named; it is never replaced by training from scratch. Raises ParamsError if its
    weights cannot be loaded.
    """
    size, reason = _size(summary.shorter, name)
    if size is None:
        return EncoderChoice(None, reason)
    encoder = _listed(name or DEFAULT)
    reduced = REDUCED.get(encoder.name, encoder.size)
    pixels = reduced if size == "reduced" else encoder.size
    try:
        sample = _measured(summary, encoder, pixels, device)
    except ParamsError as error:
        if name:
            raise
        return EncoderChoice(None, f"{error}; then run this command again")
    images, training = len(summary.source.rows), sum(summary.split_sizes()[0])
    if (minutes := images / sample.images_per_second / 60) > LONGEST_MINUTES and pixels > reduced:
        reason = f"at {pixels} pixels `embed` would take {minutes:,.0f} minutes here, above {LONGEST_MINUTES}"
        pixels, sample = reduced, _measured(summary, encoder, reduced, device)
    if not name and training >= MANY and not sample.above_chance:
        number = counted(training, "training image")
        return EncoderChoice(None, f"{number}, and kNN on features of {encoder.name} is not above chance")
    seconds = images / sample.images_per_second + START_SECONDS + training * TRAINING_SECONDS
    why = f"{'--encoder' if name else WHY}; about {counted(max(1, round(seconds / 60)), 'minute')} on this machine; {sample}"
    return EncoderChoice(encoder, why, pixels, reason, sample, seconds)


def _size(shorter: int, name: str | None) -> tuple[str | None, str]:
    size, reason = next((size, reason) for start, size, reason in reversed(SIZES) if shorter >= start)
    return ("reduced", SIZES[1][2]) if name and size is None else (size, reason)


def _listed(name: str) -> Encoder:
    try:
        return find_encoder(name)
    except UnknownEncoderError as error:
        raise ParamsError(f"--encoder {name!r}: {error}") from None


def _measured(summary: FolderSummary, encoder: Encoder, size: int, device: torch.device) -> SampleResult:
    from pipeline.model_io.encoder import load_encoder
    from pipeline.preparation.encoder_sample import measure_sample

    image = ImageParams.model_validate(image_values(encoder, size))
    return measure_sample(summary.source, load_encoder(EncoderParams(name=encoder.name), image), image, device)


def image_values(encoder: Encoder, size: int) -> dict[str, Any]:
    """Return section `image` for an encoder. size: image side in pixels."""
    return {
        "size": size, "resize_to": size, "mean": list(encoder.mean), "std": list(encoder.std),
        "interpolation": encoder.interpolation,
    }  # fmt: skip


REASONS = {
    "pretrained": "the encoder has its own weights",
    "image.mean": "the value of the encoder's pretraining",
    "image.std": "the value of the encoder's pretraining",
    "image.interpolation": "the filter of the encoder's pretraining",
    "image.resize_to": "keeps the whole shorter side and the centre of the longer side",
    "backbone": "a cosine classifier on the encoder's features",
    "adapter": "hidden units of a residual adapter on the features",
    "projection_hidden": "the heads embed the whole queue in each step; with the feature width they have ten times the weights",
    "epochs": "an epoch reads stored features and takes seconds",
    "learning_rate": "in proportion to the batch size",
    "teacher.batch_size": f"recipes/{RECIPE}; at most an eighth of the images; {LARGE_BATCH} from {8 * LARGE_EIGHTH:,} images",
    "batch_size": f"recipes/{RECIPE}; at most an eighth of the images",
}


def encoder_values(choice: EncoderChoice, encoder: Encoder, batch: int) -> Suggestions:
    """Return the recipe's values for an encoder: dotted key → (value, reason).

    batch: an eighth of the training images, the largest batch size; of the teacher see `proposed_batch`. The learning rate is
    scaled with the batch size.
    """
    recipe = resolve(RECIPES / RECIPE, set()) | {"image": image_values(encoder, choice.size)}
    del recipe["encoder"]
    section = EncoderParams(name=encoder.name).model_dump(mode="json")  # all keys, because `dvc exp run -S` adds none
    values: Suggestions = {"encoder": (section, choice.reason)}
    for key, value in flat(recipe).items():
        part, _, last = key.rpartition(".")
        if last in ("batch_size", "learning_rate"):
            listed = recipe[part]["batch_size"]
            proposed = proposed_batch(batch, listed) if part == "teacher" else min(batch, listed)
            value = proposed if last == "batch_size" else value * proposed / listed
        reason = REASONS.get(key) or REASONS.get(last) or f"recipes/{RECIPE}"
        if ".augment." in key:
            reason = "stored features cannot be augmented in training; encoder.views stores augmented views"
        values[key] = (value, reason)
    values["image.size"] = (choice.size, choice.size_reason)
    return values


def proposed_batch(largest: int, listed: int) -> int:
    """Return the teacher's batch size on stored features. largest: an eighth of the training images; listed: the recipe's."""
    return LARGE_BATCH if largest >= LARGE_EIGHTH else min(largest, listed)
