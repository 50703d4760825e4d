"""Stored features of images: write and read shards of float16 features, and load a split of features for training.

artifacts/embeddings/ holds shards of SHARD_ROWS rows for each split, in the order of the split's table. index.json records
the encoder that computed them. A shard has the tensors `features`, float16 [n,1+V,D] (the image itself, then V augmented
views), and `sha256`, uint8 [n,32], of the encoded images. Its metadata has the key of everything else that a feature
depends on, and the sha256 of both tensors. Damaged or edited features are therefore detected and computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.data.assignment import SPLITS
from pipeline.data.dataset import AnyImages, Images, evaluation_images, training_images
from pipeline.data.split_tables import ArrowStrings, read_split
from pipeline.params import AugmentParams, EncoderParams, ImageParams, Params
from pipeline.shared.artifacts import EMBEDDINGS, EMBEDDINGS_INDEX, write_file
from pipeline.shared.errors import ParamsError, StageError
from pipeline.sources import open_reader

SHARD_ROWS = 1024
FEATURES, HASHES, KEY, KEYS = "features", "sha256", "key", "keys"
READER_BYTES = 256 * 2**20  # size of the image cache of a report or an export


@dataclass(frozen=True)
class FeatureImages(Images):
    """A split of features instead of images. images: float16 [N,1+V,D], features of the image itself and of V views.

    encoder: EncoderRecord as a dict.
    """

    encoder: dict[str, Any]

    def pixels(self, chosen: Tensor) -> Tensor:
        """Return the features float16 [B,D] of the images themselves, without views, instead of pixels."""
        return self.images[chosen, 0]


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}-{number:05}.safetensors"


def split_hashes(split: str) -> np.ndarray:
    """Compute the sha256 of the encoded images of a split, uint8 [N,32], in the order of its table."""
    column = read_split(split, ["sha256"]).column("sha256")
    return np.frombuffer(b"".join(bytes.fromhex(text.as_py()) for text in column), np.uint8).reshape(-1, 32)


def write_shard(path: Path, features: Tensor, hashes: np.ndarray, key: str) -> None:
    """Write a shard atomically."""
    tensors = {FEATURES: features.contiguous(), HASHES: torch.from_numpy(hashes.copy())}
    # One metadata entry, because safetensors writes several entries in random order.
    write_file(path, safetensors.torch.save(tensors, {KEY: f"{key} {_checksum(tensors)}"}))


def read_shard(path: Path, key: str) -> dict[str, Tensor] | None:
    """Return the tensors of a shard; None if it does not exist, is damaged or has another key."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            stored, _, checksum = (file.metadata() or {}).get(KEY, "").partition(" ")
            if stored != key:
                return None
            tensors = {name: file.get_tensor(name) for name in (FEATURES, HASHES)}
    except (OSError, safetensors.SafetensorError):
        return None
    return tensors if _checksum(tensors) == checksum else None


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in (FEATURES, HASHES):
        digest.update(tensors[name].numpy())
    return digest.hexdigest()


class StoredFeatures:
    """Finds features in finished shards by the hash of the image. Keeps a hash and a row per image; features stay on disk."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._shards: list[Path] = []
        self._at: dict[bytes, tuple[int, int]] = {}

    def add(self, path: Path) -> None:
        """Add the rows of a shard, unless `read_shard` does not accept it."""
        shard = read_shard(path, self._key)
        if shard is None:
            return
        for row, digest in enumerate(shard[HASHES].numpy()):
            self._at.setdefault(digest.tobytes(), (len(self._shards), row))
        self._shards.append(path)

    def missing(self, hashes: np.ndarray) -> list[int]:
        """Return the first row of each image in `hashes`, uint8 [n,32], whose feature is in no shard."""
        rows: dict[bytes, int] = {}
        for row, digest in enumerate(hashes):
            if (image := digest.tobytes()) not in self._at:
                rows.setdefault(image, row)
        return list(rows.values())

    def gather(self, hashes: np.ndarray, computed: dict[bytes, Tensor]) -> Tensor:
        """Gather the features [n,1+V,D] of `hashes` from `computed` and from the shards. Each shard is read once."""
        features: list[Tensor | None] = [computed.get(digest.tobytes()) for digest in hashes]
        rows_of_shard: dict[int, list[tuple[int, int]]] = {}
        for row, digest in enumerate(hashes):
            if features[row] is None:
                shard, position = self._at[digest.tobytes()]
                rows_of_shard.setdefault(shard, []).append((row, position))
        for shard, rows in rows_of_shard.items():
            stored = read_shard(self._shards[shard], self._key)
            if stored is None:
                raise StageError(f"{self._shards[shard]}: has changed while embed ran; run `dvc repro embed` again")
            for row, position in rows:
                features[row] = stored[FEATURES][position]
        return torch.stack([feature for feature in features if feature is not None])


def write_index(
    folder: Path, encoder: EncoderParams, image: ImageParams, record: dict[str, Any], keys: dict[str, str]
) -> None:
    """Write index.json: the params that the features depend on, the record of the encoder, the key of each split's shards."""
    index = {"params": _of(encoder), "image": image.model_dump(mode="json"), "encoder": record, KEYS: keys}
    write_file(folder / EMBEDDINGS_INDEX.name, json.dumps(index, indent=2) + "\n")


def _of(encoder: EncoderParams) -> dict[str, Any]:
    unused = {"weights", "download", "licence"}  # the sha256 identifies the weights
    if not encoder.views:
        unused |= {"crop_padding", "flip"}
    return encoder.model_dump(mode="json", exclude=unused)


def read_index(encoder: EncoderParams, image: ImageParams) -> dict[str, Any]:
    """Read index.json: `encoder` is the record of the encoder, `keys` has the key of the shards of each split.

    Raises ParamsError when no features are stored, or when they were computed with other params.
    """
    try:
        index: dict[str, Any] = json.loads(EMBEDDINGS_INDEX.read_text(encoding="utf-8"))
        for split in SPLITS:
            index[KEYS][split], index["encoder"]["width"]
        stored = {**index["params"], **{f"image.{key}": value for key, value in index["image"].items()}}
    except FileNotFoundError:
        raise ParamsError(f"{EMBEDDINGS_INDEX}: no such file; run `dvc repro embed` first") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ParamsError(f"{EMBEDDINGS_INDEX}: damaged or without features; run `dvc repro -f embed`") from None
    expected = {**_of(encoder), **{f"image.{key}": value for key, value in image.model_dump(mode="json").items()}}
    for key, value in expected.items():
        if stored.get(key) != value:
            name = key if key.startswith("image.") else f"encoder.{key}"
            raise ParamsError(
                f"{name} is {json.dumps(value)}, but the features of {EMBEDDINGS} were computed with "
                f"{json.dumps(stored.get(key))}; run `dvc repro embed`"
            )
    return index


def stored_encoder(params: Params) -> dict[str, Any] | None:
    """Return the record of the encoder that computed the stored features; None without an encoder. Raises as `read_index`."""
    return read_index(params.encoder, params.image)["encoder"] if params.encoder else None


def takes_features(params: Params, stage: str) -> bool:
    """Whether the network of a stage takes stored features: params have an encoder, and the stage does not tune it."""
    return params.encoder is not None and (stage != "student" or params.student.tune == "none")


def training_inputs(
    params: Params, stage: str, device: torch.device, *, augment: AugmentParams, views: int
) -> tuple[AnyImages, AnyImages, str | None]:
    """Load the training and validation split of a stage: features if its network takes them, else images."""
    if not takes_features(params, stage):
        return training_images(params, device, augment=augment, views=views)
    return load_features(params, "train"), load_features(params, "validation"), None


def evaluation_inputs(params: Params, split: str) -> dict[str, AnyImages]:
    """Load a split as the inputs of each stage's network: features, or the images of `evaluation_images`.

    Both take the same inputs, unless the student tunes the encoder: it then takes images, and the teacher takes features.
    """
    tuned = params.student.tune != "none"
    student = load_features(params, split) if takes_features(params, "student") else evaluation_images(params, split)
    return {"teacher": load_features(params, split) if tuned else student, "student": student}


def load_features(params: Params, split: str) -> FeatureImages:
    """Load the features of a split into memory, 2 bytes per value.

    Raises ParamsError as `read_index` does, StageError when the features belong to other images than those of the split.
    """
    if params.encoder is None:
        raise ParamsError("encoder is null; name one of `tailor encoders`")
    index = read_index(params.encoder, params.image)
    encoder = index["encoder"]
    table = read_split(split, ["sample_id", "label", "reference"])
    shards = list(_shards(split, index[KEYS][split]))
    features = torch.cat(shards) if shards else torch.zeros(0, 1, encoder["width"], dtype=torch.float16)
    ids, references = ArrowStrings(table.column("sample_id")), ArrowStrings(table.column("reference"))
    labels = torch.from_numpy(table.column("label").to_numpy().astype(np.int64))
    return FeatureImages(features, labels, ids, references, open_reader(params.data, READER_BYTES), encoder)


def _shards(split: str, key: str) -> Iterator[Tensor]:
    hashes = split_hashes(split)
    for number, start in enumerate(range(0, len(hashes), SHARD_ROWS)):
        path = EMBEDDINGS / shard_name(split, number)
        shard = read_shard(path, key)
        if shard is None:
            raise StageError(f"{path}: missing, damaged or of another encoder; run `dvc repro -f embed`")
        if not np.array_equal(shard[HASHES].numpy(), hashes[start : start + SHARD_ROWS]):
            raise StageError(f"{path}: holds features of other images than data/split; run `dvc repro embed`")
        yield shard[FEATURES]
