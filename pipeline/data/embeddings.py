"""Stored features of images: shards of float16 safetensors beside an index, and a split of features for training.

artifacts/embeddings/ holds, for each split, shards of SHARD_ROWS rows in the order of the split's table, and index.json
with the encoder that computed them. A shard has `features` float16 [n,1+V,D] (the image itself, then V augmented views)
and `sha256` uint8 [n,32] of the encoded images; its metadata has the key of everything else that a feature depends on,
and the sha256 of both tensors: features that were damaged or edited are computed again, not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.data.dataset import AnyImages, Images, evaluation_images, training_images
from pipeline.data.split_tables import ArrowStrings, read_split
from pipeline.params import AugmentParams, EncoderParams, ImageParams, Params
from pipeline.shared.artifacts import EMBEDDINGS, EMBEDDINGS_INDEX, SPLIT, write_file
from pipeline.shared.errors import ParamsError, StageError
from pipeline.sources import open_reader

SHARD_ROWS = 1024
FEATURES, HASHES, KEY, KEYS = "features", "sha256", "key", "keys"
READER_BYTES = 256 * 2**20  # cache of the images that a report or an export reads


@dataclass(frozen=True)
class FeatureImages(Images):
    """A split whose rows are features: images float16 [N,1+V,D], the feature of the image itself and of V views.

    encoder: the record of the encoder.
    """

    encoder: dict[str, Any]

    def pixels(self, chosen: Tensor) -> Tensor:
        """Features float16 [B,D] of the images themselves, in the place of pixels."""
        return self.images[chosen, 0]


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:05}.safetensors"


def split_hashes(split: str, folder: Path = SPLIT) -> np.ndarray:
    """sha256 of the encoded images of a split, uint8 [N,32], in the order of its table."""
    column = read_split(split, ["sha256"], folder).column("sha256")
    return np.frombuffer(b"".join(bytes.fromhex(text.as_py()) for text in column), np.uint8).reshape(-1, 32)


def write_shard(path: Path, features: Tensor, hashes: np.ndarray, key: str) -> None:
    """Write a shard whole or not at all."""
    tensors = {FEATURES: features.contiguous(), HASHES: torch.from_numpy(hashes.copy())}
    # One entry: safetensors writes several in random order.
    write_file(path, safetensors.torch.save(tensors, {KEY: f"{key} {_checksum(tensors)}"}))


def read_shard(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors of a shard; None if it does not exist, is damaged or has another key."""
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
    """Features of finished shards by the hash of the image. Memory: a hash and a row an image; features stay on disk."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._shards: list[Path] = []
        self._at: dict[bytes, tuple[int, int]] = {}

    def add(self, path: Path) -> bool:
        """Add the rows of a shard; returns False for one that `read_shard` does not accept."""
        shard = read_shard(path, self._key)
        if shard is None:
            return False
        for row, digest in enumerate(shard[HASHES].numpy()):
            self._at.setdefault(digest.tobytes(), (len(self._shards), row))
        self._shards.append(path)
        return True

    def missing(self, hashes: np.ndarray) -> list[int]:
        """First row of each image of `hashes` uint8 [n,32] that no shard has."""
        rows: dict[bytes, int] = {}
        for row, digest in enumerate(hashes):
            if (image := digest.tobytes()) not in self._at:
                rows.setdefault(image, row)
        return list(rows.values())

    def gather(self, hashes: np.ndarray, computed: dict[bytes, Tensor]) -> Tensor:
        """Features [n,1+V,D] of `hashes`, from `computed` or from the shards, each of which is read once."""
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
    unused = {"weights", "download", "licence"}  # weights have a sha256
    if not encoder.views:
        unused |= {"crop_padding", "flip"}
    return encoder.model_dump(mode="json", exclude=unused)


def read_index(encoder: EncoderParams, image: ImageParams, folder: Path = EMBEDDINGS) -> dict[str, Any]:
    """Read index.json: `encoder` is the record of the encoder whose features are stored, `keys` those of the shards.

    Raises ParamsError when there are none, or when they were computed with other params.
    """
    path = folder / EMBEDDINGS_INDEX.name
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        index[KEYS].items()
        stored = {**index["params"], **{f"image.{key}": value for key, value in index["image"].items()}}
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run `dvc repro embed` first") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ParamsError(f"{path}: damaged or without features; run `dvc repro -f embed`") from None
    expected = {**_of(encoder), **{f"image.{key}": value for key, value in image.model_dump(mode="json").items()}}
    for key, value in expected.items():
        if stored.get(key) != value:
            name = key if key.startswith("image.") else f"encoder.{key}"
            raise ParamsError(
                f"{name} is {value!r}, but the features of {folder} were computed with {stored.get(key)!r}; "
                "run `dvc repro embed`"
            )
    return index


def stored_encoder(params: Params) -> dict[str, Any] | None:
    """Record of the encoder whose features teacher and student take; None if they take images. Raises as `read_index`."""
    return read_index(params.encoder, params.image)["encoder"] if params.encoder else None


def takes_features(params: Params, stage: str) -> bool:
    """Whether the network of a stage takes stored features: if params have an encoder, which the stage does not tune."""
    return params.encoder is not None and (stage != "student" or params.student.tune == "none")


def training_inputs(
    params: Params, stage: str, device: torch.device, *, augment: AugmentParams, views: int
) -> tuple[AnyImages, AnyImages, str | None]:
    """The training and the validation split of a stage: features if its network takes them, else as `training_images`."""
    if not takes_features(params, stage):
        return training_images(params, device, augment=augment, views=views)
    return load_features(params, "train"), load_features(params, "validation"), None


def evaluation_inputs(params: Params, split: str, stage: str = "student") -> AnyImages:
    """What the network of a stage takes of a split: features, or images as of `evaluation_images`."""
    return load_features(params, split) if takes_features(params, stage) else evaluation_images(params, split)


def load_features(params: Params, split: str, folder: Path = SPLIT, embeddings: Path = EMBEDDINGS) -> FeatureImages:
    """Load the features of a split into memory: 2 bytes a value.

    Raises ParamsError as `read_index` does, StageError when the features are of other images than the split's.
    """
    if params.encoder is None:
        raise ParamsError("encoder is null; name one of `tailor encoders`")
    index = read_index(params.encoder, params.image, embeddings)
    encoder = index["encoder"]
    table = read_split(split, ["sample_id", "label", "reference"], folder)
    shards = list(_shards(split, split_hashes(split, folder), embeddings, index[KEYS][split]))
    features = torch.cat(shards) if shards else torch.zeros(0, 1, encoder["width"], dtype=torch.float16)
    ids, references = ArrowStrings(table.column("sample_id")), ArrowStrings(table.column("reference"))
    labels = torch.from_numpy(table.column("label").to_numpy().astype(np.int64))
    return FeatureImages(features, labels, ids, references, open_reader(params.data, READER_BYTES), encoder)


def _shards(split: str, hashes: np.ndarray, folder: Path, key: str) -> Iterator[Tensor]:
    for number, start in enumerate(range(0, len(hashes), SHARD_ROWS)):
        path = folder / shard_name(split, number)
        shard = read_shard(path, key)
        if shard is None:
            raise StageError(f"{path}: missing, damaged or of another encoder; run `dvc repro -f embed`")
        if not np.array_equal(shard[HASHES].numpy(), hashes[start : start + SHARD_ROWS]):
            raise StageError(f"{path}: holds features of other images than data/split; run `dvc repro embed`")
        yield shard[FEATURES]


def bad_rows(features: Tensor) -> Sequence[int]:
    """Rows of features [n,1+V,D] with a value that is not finite."""
    return (~features.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
