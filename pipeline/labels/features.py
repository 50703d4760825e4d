"""Features of labelled images and of files: of the frozen encoder if params.yaml names one, else of the student."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.preprocess import ImageError
from pipeline.data.assignment import SPLITS
from pipeline.data.dataset import evaluation_images
from pipeline.data.split_tables import load_classes, read_groups, read_split
from pipeline.data.stream_decoding import decode_exact
from pipeline.features.stored import load_features, takes_features
from pipeline.model_io.checkpoint import check_image, load_model
from pipeline.model_io.devices import choose_device
from pipeline.model_io.encoder import load_encoder
from pipeline.model_io.inference import EVALUATION_BATCH, divergence_named, outputs
from pipeline.params import Params
from pipeline.shared.artifacts import STUDENT
from pipeline.shared.errors import DataError, ParamsError
from pipeline.shared.progress import progress_bar
from pipeline.sources.source import in_parts, read_image_file

BATCH = 64  # files that are decoded and computed at once


@dataclass(frozen=True)
class LabelledImages:
    """Images of some splits with their features, float [N,D], and labels, int64 [N].

    origin: int64 [N], equal for byte-identical images and for images of one group (data.group): they have the same label
    error, and do not count as evidence for each other. splits, sample_ids, references: of each image.
    """

    features: Tensor
    labels: Tensor
    origin: Tensor
    splits: list[str]
    sample_ids: list[str]
    references: list[str]
    classes: list[str]

    @property
    def counts(self) -> np.ndarray:
        """Images of each class, int [C]."""
        return np.bincount(self.labels.numpy(), minlength=len(self.classes))


class FeatureNetwork:
    """Computes features: stored ones of the encoder for images of a split, else those of the network."""

    def __init__(self, params: Params) -> None:
        if params.segmentation:
            raise ParamsError("params.yaml has section segmentation; its images have label maps and no labels")
        self._params, self._device = params, choose_device(params.device)
        self._stored = takes_features(params, "student")
        self._network: Callable[[Tensor], Tensor] | None = None

    @property
    def name(self) -> str:
        """Name of the network: encoder and its name, or the student."""
        return f"encoder {self._params.encoder.name}" if self._stored and self._params.encoder else "the student"

    def of_split(self, split: str) -> Tensor:
        """Features float [N,D] of a split, in the order of its table. Raises as `load_features` or `load_model` does."""
        if self._stored:
            return load_features(self._params, split).images[:, 0].float()
        images, compute = evaluation_images(self._params, split), self._load()
        batches = images.batches(torch.arange(len(images)), EVALUATION_BATCH)
        features = [compute(pixels) for pixels in batches]
        return torch.cat(features) if features else torch.zeros(0, 1)

    def of_files(self, files: Sequence[Path], known: set[str]) -> tuple[Tensor, list[Path], dict[Path, str]]:
        """Features float [M,D] of image files, the files, and the skipped files with the reason.

        known: sha256 of images to skip; a second copy of a file is skipped too. Raises DataError if no image is left.
        """
        compute, seen = self._load(), dict.fromkeys(known, "is in the data set already")
        features: list[Tensor] = []
        used: list[Path] = []
        skipped: dict[Path, str] = {}
        with progress_bar(unit="images") as bar, ThreadPoolExecutor() as pool:
            task = bar.add_task("reading images", total=len(files), rate="")
            for part in in_parts(files, BATCH):
                pixels = []
                for path, result in zip(part, pool.map(self._decoded, part), strict=True):
                    digest, image = result if isinstance(result, tuple) else ("", None)
                    if image is None or digest in seen:
                        skipped[path] = str(result) if image is None else seen[digest]
                        continue
                    seen[digest] = "is a copy of another file"
                    pixels.append(image)
                    used.append(path)
                if pixels:
                    features.append(compute(torch.stack(pixels)))
                bar.advance(task, len(part))
        if not features:
            reason = next(iter(skipped.values()), "there is no image")
            raise DataError(f"{files[0].parent if files else 'the folder'}: no image can be used: {reason}")
        return torch.cat(features), used, skipped

    def _decoded(self, path: Path) -> tuple[str, Tensor] | str:
        try:
            data = read_image_file(path)
            return hashlib.sha256(data).hexdigest(), decode_exact(data, self._params.image)
        except (DataError, ImageError) as error:
            return str(error)

    def _load(self) -> Callable[[Tensor], Tensor]:
        """Function from pixels uint8 [B,3,H,W] to features float [B,D] on the CPU."""
        if self._network is None:
            self._network = self._encoder() if self._stored else self._student()
        return self._network

    def _encoder(self) -> Callable[[Tensor], Tensor]:
        assert self._params.encoder is not None
        encoder, image = load_encoder(self._params.encoder, self._params.image), self._params.image
        encoder.network.to(self._device)
        section = self._params.encoder.model_copy(update={"views": 0})

        def compute(pixels: Tensor) -> Tensor:
            hashes = np.zeros((len(pixels), 32), np.uint8)  # only augmented views use them
            return encoder.features(pixels.to(self._device), hashes, image, section)[:, 0].float()

        return compute

    def _student(self) -> Callable[[Tensor], Tensor]:
        model, config = load_model(STUDENT, "student")
        check_image(config, self._params.image, STUDENT)
        model.to(self._device)

        def compute(pixels: Tensor) -> Tensor:
            with divergence_named(STUDENT, "student"):
                return outputs(model, pixels, self._params.image, self._device)[0]

        return compute


def labelled_images(network: FeatureNetwork, splits: Sequence[str] = SPLITS) -> LabelledImages:
    """Read the images of the splits with their features. Raises DataError without images, and as `FeatureNetwork` does."""
    tables = {split: read_split(split, ["sample_id", "label", "reference", "sha256"]) for split in splits}
    tables = {split: table for split, table in tables.items() if table.num_rows}
    if not tables:
        raise DataError("data/split: holds no images; run `dvc repro split`")
    features = [network.of_split(split) for split in tables]
    labels = np.concatenate([table.column("label").to_numpy() for table in tables.values()]).astype(np.int64)
    values = {
        name: [value for table in tables.values() for value in table.column(name).to_pylist()]
        for name in ("sample_id", "reference", "sha256")
    }
    groups = [name for split in tables for name in read_groups(split) or []]
    origin = np.unique(groups or values["sha256"], return_inverse=True)[1]
    names = [split for split, table in tables.items() for _ in range(table.num_rows)]
    return LabelledImages(
        torch.cat(features), torch.from_numpy(labels), torch.from_numpy(origin.astype(np.int64)), names,
        values["sample_id"], values["reference"], load_classes(),
    )  # fmt: skip


def known_hashes() -> Iterator[str]:
    """sha256 of every image of the splits."""
    for split in SPLITS:
        yield from read_split(split, ["sha256"]).column("sha256").to_pylist()
