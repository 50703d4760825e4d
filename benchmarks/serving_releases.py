"""Releases for benchmarks.serving: exports of ResNet-32 at 32 pixels and ResNet-50 at 224 by the pipeline's stages.

Split, prior, evaluation and export run as in `dvc repro`; only training is omitted, so the weights are random, which
does not change the cost of inference.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.networks.cosine_classifier import ImageClassifier
from pipeline import evaluate, export, prior, split
from pipeline.model_io.checkpoint import ModelConfig, save_model
from pipeline.params import PARAMS_FILE, Params, parse_params, read_yaml
from pipeline.shared.artifacts import EXPORT, REPOSITORY, STUDENT, TEACHER
from serving.repository.manifest import STUDENT_NAME, load_manifest
from serving.repository.model_config import Device, Placement
from serving.repository.writer import write_repository
from serving.shared.atomic import whole_folder

CLASSES = 10
IMAGES = 32  # distinct images in the requests
QUALITY = 85  # of the JPEG files


@dataclass(frozen=True)
class Network:
    """A served network and its load.

    size: pixels of its input. photo: width and height of the JPEG files for the classifier. users: concurrent requests.
    batches: batch sizes to try with raw ONNX Runtime. stretch: factor on the length of a turn. instances, own_network:
    as in Placement; None is the default of `tailor repository`.
    """

    name: str
    backbone: str
    size: int
    photo: tuple[int, int]
    users: int
    batches: tuple[int, ...]
    stretch: float = 1.0
    instances: int | None = None
    own_network: bool | None = None


RESNET32 = Network("ResNet-32", "resnet32", 32, (32, 32), 32, (1, 8, 16, 32))
RESNET50 = Network("ResNet-50", "torchvision/resnet50", 224, (500, 375), 8, (1, 4, 8), 2.0)
CALLS_STUDENT = {"instances": 1, "own_network": False}
NETWORKS = {
    "resnet32": RESNET32,
    "resnet32-asking": replace(RESNET32, name="ResNet-32, 1 instance, classifier calls student", **CALLS_STUDENT),
    "resnet50": RESNET50,
    "resnet50-asking": replace(RESNET50, name="ResNet-50, 1 instance, classifier calls student", **CALLS_STUDENT),
    # For trials of the benchmark: the same stages and servers with a very small network.
    "resnet20": Network("ResNet-20", "resnet20", 16, (16, 16), 8, (1, 8)),
}
TRIAL = "resnet20"


@dataclass(frozen=True)
class Release:
    """An export on disk and images for it: pixels uint8 [N,3,S,S], and JPEG files."""

    network: Network
    graph: Path
    repository: Path
    pixels: np.ndarray
    photos: list[bytes]


def release_of(key: str, work: Path, device: Device = "cpu") -> Release:
    """Return the release of a network; export it into `work` if it does not exist."""
    network = NETWORKS[key]
    folder = work.absolute() / key
    if not (folder / EXPORT / "manifest.json").is_file():
        make_export(network, folder)
    load_manifest(folder / EXPORT)  # check the hashes of its files
    placement = Placement(device, instances=network.instances, own_network=network.own_network)
    repository = write_repository(folder / EXPORT, folder / f"{REPOSITORY}-{device}", placement)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (IMAGES, 3, network.size, network.size), dtype=np.uint8)
    photos = [photo(generator, *network.photo) for _ in range(IMAGES)]
    return Release(network, folder / EXPORT / STUDENT_NAME, repository, pixels, photos)


def make_export(network: Network, folder: Path) -> None:
    """Run the pipeline's stages with two untrained networks."""
    content = read_yaml(PARAMS_FILE)
    content["image"] |= {"size": network.size, "resize_to": network.size}
    content["data"] |= {"test_per_class": 2, "validation_per_class": 1}
    for name in ("teacher", "student"):
        content[name]["backbone"] = network.backbone
    params = parse_params(content, PARAMS_FILE)
    with whole_folder(folder) as partial, contextlib.chdir(partial):
        split.run(params)
        prior.run(params)
        for output in (TEACHER, STUDENT):
            save_untrained(params, network, output)
        evaluate.run(params)
        export.run(params)


def save_untrained(params: Params, network: Network, output: Path) -> None:
    """Write a network in the form of a training stage, with its initial weights."""
    torch.manual_seed(0)
    tau_s, image = params.student.tau_s, params.image
    weights = ImageClassifier(network.backbone, CLASSES, tau_s).state_dict()
    save_model(weights, ModelConfig(network.backbone, CLASSES, tau_s, image.size, image.mean, image.std), output)


def photo(generator: np.random.Generator, width: int, height: int) -> bytes:
    """Return a JPEG file with shapes at several scales and noise; it has about as many bytes as a photograph."""
    picture = np.zeros((height, width, 3), dtype=np.float32)
    for cells in (2, 8, 32):
        coarse = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 3
    picture += generator.normal(0, 8, picture.shape)
    stream = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()
