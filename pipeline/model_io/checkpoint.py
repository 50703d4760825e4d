"""Saved networks: model.safetensors with a readable config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from models.experts.backbone import expert_backbone
from models.networks.adapters import feature_backbone, with_encoder
from models.networks.backbones import UnknownBackboneError
from models.networks.cosine_classifier import (
    CausalClassifier,
    Classifier,
    CosineClassifier,
    HeadError,
    ImageClassifier,
    LinearClassifier,
    LinearHead,
)
from models.networks.memory import FeatureMemory, empty_rows
from models.networks.memory_fit import MINIMUM_IMAGES
from models.networks.tuning import add_adapters
from models.segmentation.network import SegmentationModel
from pipeline.model_io.encoder import build_encoder, load_encoder
from pipeline.params import ImageParams, Params
from pipeline.shared.artifacts import CLASSIFIER, STUDENT, write_file, write_json
from pipeline.shared.errors import ParamsError, StageError
from serving.shared.terminal import counted

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
BEST = "best"  # subfolder for the network of the epoch with the best validation accuracy


@dataclass(frozen=True)
class ModelConfig:
    """Parameters that rebuild the network: backbone, number of classes, tau_s and the format of its input images.

    adjustment: strength of the logit adjustment in the L_cls that trained it; see Prior.balanced_shift. encoder: the
    record of the frozen encoder whose features are the inputs; None if images are the inputs. adapter:
    hidden units of the residual adapter on these features; 0 for none. memory: record of the memory of training features
    (training/student_memory.py); None for none. tune: how the encoder was tuned. Unless it is `none`,
    the encoder is part of the network, which takes images. tune_rank: hidden units of the adapters of `adaptformer`.
    interpolation: filter of the images' resize. second_stage: record of the second stage whose linear head replaces the
    trained classifier; tau_s is then 1. None for none. classifier: kind and parameters of the trained classifier, without
    tau_s, which is 1 for all but the cosine classifier; None: the cosine classifier. experts: arguments `experts`,
    `shared` and `narrow` of expert_backbone; None for one network. segmentation: `canvas` and `classifier` of a
    segmentation network, as in params.segmentation; None for classification.
    """

    backbone: str
    classes: int
    tau_s: float
    image_size: int
    mean: list[float]
    std: list[float]
    adjustment: float | None = 1.0
    encoder: dict[str, Any] | None = None
    adapter: int = 0
    memory: dict[str, Any] | None = None
    tune: str = "none"
    tune_rank: int = 0
    interpolation: str = "bilinear"
    second_stage: dict[str, Any] | None = None
    classifier: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    segmentation: dict[str, Any] | None = None


def student_folder(params: Params) -> tuple[Path, str]:
    """Return the folder of the student that is evaluated and exported, and its stage: `student` or `classifier`."""
    return (STUDENT, "student") if params.classifier.kind == "none" else (CLASSIFIER, "classifier")


def build_model(config: ModelConfig, key: str) -> ImageClassifier | SegmentationModel:
    """Create a newly initialised network.

    Raises ParamsError that names the params key for an unknown backbone, and for a classifier that does not fit its feature.
    """
    try:
        model = _build_network(config, key)
    except HeadError as error:
        raise ParamsError(f"{key.removesuffix('backbone')}classifier.{error}") from None
    if stage := config.second_stage:
        centred, gated = stage["kind"] == "ncm", stage["kind"] == "disalign"
        model.classifier = LinearHead(model.feature_dim, config.classes, centred=centred, gated=gated)
    return model


def classifier_of(record: dict[str, Any] | None) -> Callable[[int, int], Classifier]:
    """What creates the classifier from feature width and number of classes. record: ModelConfig.classifier."""
    if record is None:
        return CosineClassifier
    values = {key: value for key, value in record.items() if key != "kind"}
    kinds: dict[str, Callable[..., Classifier]] = {"linear": LinearClassifier, "causal": CausalClassifier}
    return partial(kinds[record["kind"]], **values)


def _build_network(config: ModelConfig, key: str) -> ImageClassifier | SegmentationModel:
    head = classifier_of(config.classifier)
    if config.encoder:
        width, memory, stored = config.encoder["width"], None, config.memory
        if stored:
            rows = empty_rows(stored["rows"], width)
            memory = FeatureMemory(rows, config.classes, stored["tau"], stored["weight"])
        backbone = feature_backbone(width, config.adapter, with_input=memory is not None)
        if config.tune != "none":
            encoder = build_encoder(config.encoder["name"], config.encoder["size"])
            if config.tune == "adaptformer":
                add_adapters(encoder.network, config.tune_rank)
            backbone = with_encoder(encoder, backbone)
        cosine = not stored or stored["classifier"] == "both"
        return ImageClassifier(backbone, config.classes, config.tau_s, memory=memory, cosine=cosine, head=head)
    try:
        if config.experts:
            experts = expert_backbone(config.backbone, image_size=config.image_size, **config.experts)
            return ImageClassifier(experts, config.classes, config.tau_s, head=head)
        if config.segmentation:
            return SegmentationModel(config.backbone, config.classes, config.tau_s, config.segmentation["classifier"])
        return ImageClassifier(config.backbone, config.classes, config.tau_s, config.image_size, head=head)
    except UnknownBackboneError as error:
        raise ParamsError(f"{key}: {error}") from None


def describe_memory(record: dict[str, Any]) -> str:
    """Describe a memory in one line. record: ModelConfig.memory."""
    means = "" if record["rows"] == record["images"] else f" for {counted(record['images'], 'image')}"
    images = record["validation_images"]
    fitted = f"fitted on {counted(images, 'validation image')}" if images >= MINIMUM_IMAGES else few_images(images)
    return (
        f"memory of {counted(record['rows'], 'row')}{means}, tau {record['tau']:.3g}, weight {record['weight']:.3g} "
        f"({fitted})"
    )


def describe_second_stage(record: dict[str, Any]) -> str:
    """Kind of a second stage and the values that were fitted, such as `tau_norm, tau 0.7`; from ModelConfig.second_stage."""
    fitted = [f"{name} {record[name]:.3g}" for name in ("tau", "scale") if name in record]
    return ", ".join([record["kind"], *fitted])


def few_images(images: int) -> str:
    """State why tau and weight of a memory are not fitted. images: number of validation images, too few for a fit."""
    return f"defaults: {counted(images, 'validation image')}, fewer than {MINIMUM_IMAGES}"


def save_model(weights: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Write a network's weights and config into `folder`.

    Raises OSError that names the file, for example on a full disk.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # Serialised in memory and then written: the writer of safetensors maps the file, where a full disk raises a signal.
    write_file(folder / WEIGHTS, safetensors.torch.save(tensors))
    write_json(folder / CONFIG, asdict(config))


def check_canvas(config: ModelConfig, params: Params, folder: Path) -> None:
    """Raise ParamsError when a segmentation network was trained with another task, canvas or classifier than the params."""
    asked = params.segmentation.model_dump(include={"canvas", "classifier"}) if params.segmentation else None
    if config.segmentation != asked:
        raise ParamsError(
            f"segmentation is {asked or 'null'}, but {folder} was trained with {config.segmentation or 'null'}; run "
            "`dvc repro` to train again"
        )


def check_image(config: ModelConfig, image: ImageParams, folder: Path) -> None:
    """Raise ParamsError when a network was trained with another image format than params.image."""
    trained = {"size": config.image_size, "mean": config.mean, "std": config.std, "interpolation": config.interpolation}
    for key, value in trained.items():
        if getattr(image, key) != value:
            raise ParamsError(
                f"image.{key} is {getattr(image, key)}, but {folder} was trained with {value}; run `dvc repro` to train again"
            )


def check_encoder(config: ModelConfig, encoder: dict[str, Any] | None, folder: Path) -> None:
    """Raise ParamsError when a network was trained on images, or on features of another encoder than `encoder`."""
    compared = ("name", "model", "sha256", "size", "width")  # the sha256 identifies the weights
    trained, given = ([each[key] for key in compared] if each else None for each in (config.encoder, encoder))
    if trained != given:
        names = [f"{each['name']} ({each['sha256'][:12]})" if each else "none" for each in (encoder, config.encoder)]
        raise ParamsError(
            f"encoder is {names[0]}, but {folder} was trained with {names[1]}; run `dvc repro` to train again"
        )


def load_config(folder: Path, stage: str) -> ModelConfig:
    """Read the config of a network. Raises ParamsError when it does not exist, StageError when it is damaged."""
    try:
        return ModelConfig(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ParamsError(f"{error.filename}: no such file; run `dvc repro {stage}` first") from None
    except (TypeError, ValueError) as error:
        raise _damaged(folder, stage, error) from None


def _damaged(folder: Path, stage: str, error: Exception) -> StageError:
    return StageError(
        f"{folder}: damaged or of another version: {str(error).splitlines()[0]}; run `dvc repro -f {stage}`"
    )


def check_inputs(config: ModelConfig, features: dict[str, Any] | None, folder: Path) -> None:
    """Raise ParamsError unless a network takes the inputs of a split. features: record of their encoder; None: images."""
    if config.tune == "none":
        check_encoder(config, features, folder)
    elif features:
        raise ParamsError(
            f"student.tune is none, but {folder} was trained with {config.tune}; run `dvc repro` to train again"
        )


def attach_encoder(model: ImageClassifier, config: ModelConfig, params: Params, folder: Path) -> None:
    """Put the encoder before a network that was trained on its features. Do nothing for a network that takes images.

    folder: folder of the network, for error messages. Raises ParamsError when the network was trained with another
    encoder than the params name, and as `load_encoder` does.
    """
    if params.encoder is None:
        check_encoder(config, None, folder)
        return
    loaded = load_encoder(params.encoder, params.image)
    check_encoder(config, asdict(loaded.record), folder)
    if config.tune == "none":
        model.backbone = with_encoder(loaded.network, model.backbone)


def load_model(folder: Path, stage: str) -> tuple[ImageClassifier | SegmentationModel, ModelConfig]:
    """Load a network in eval mode on the CPU. Raises ParamsError when it does not exist, StageError when damaged or NaN."""
    config = load_config(folder, stage)
    try:
        with torch.random.fork_rng(devices=[]):
            model = build_model(config, f"{folder / CONFIG}: backbone")
        model.load_state_dict(safetensors.torch.load((folder / WEIGHTS).read_bytes()))
    except FileNotFoundError as error:
        raise ParamsError(f"{error.filename}: no such file; run `dvc repro {stage}` first") from None
    except (safetensors.SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(folder, stage, error) from None
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise StageError(
            f"{folder}: {counted(len(bad), 'tensor', 'are')} not finite, {bad[0]} the first: training diverged; lower "
            f"{stage}.learning_rate and run `dvc repro -f {stage}`"
        )
    return model.eval(), config
