"""The manifest of a release: what the exported student is, checked whenever it changes hands."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MANIFEST_NAME = "manifest.json"
GOLDEN_NAME = "golden.json"


class ManifestError(ValueError):
    """A manifest that is missing, malformed or does not match its files; the message names the file."""


class ImageFormat(BaseModel):
    """How `models.preprocess.preprocess` makes the network's input: shorter side to resize_to, centre crop of size (pixels)."""

    model_config = ConfigDict(extra="forbid")
    size: int = Field(ge=1)
    resize_to: int = Field(ge=1)


class Manifest(BaseModel):
    """Everything the serving room knows of a release. `files` maps names beside the manifest to their sha256."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    version: int = Field(ge=1)
    classes: list[str] = Field(min_length=2)
    counts: list[int]
    log_prior: list[float]
    image: ImageFormat
    feature_dim: int = Field(ge=1)
    tau_s: float = Field(gt=0)
    strength: float
    top_k: int = Field(ge=1)
    max_batch_size: int = Field(ge=1)
    files: dict[str, str]
    params_sha256: str
    data_sha256: str
    code_revision: str
    versions: dict[str, str]
    metrics: dict[str, Any]

    @model_validator(mode="after")
    def _one_entry_per_class(self) -> Manifest:
        if not len(self.classes) == len(self.counts) == len(self.log_prior):
            raise ValueError("classes, counts and log_prior differ in length")
        if self.top_k > len(self.classes):
            raise ValueError(f"top_k is {self.top_k}, above the number of classes {len(self.classes)}")
        return self


class Golden(BaseModel):
    """One golden request and its answer: the encoded image (base64) and what the classifier must say of it at that strength."""

    model_config = ConfigDict(extra="forbid")
    image: str
    strength: float
    index: list[int]
    probability: list[float]


def sha256_of(path: Path) -> str:
    """sha256 of a file as hexadecimal text, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def load_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` of an export folder and check every file's sha256. Raises ManifestError naming the file."""
    path = folder / MANIFEST_NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; run `dvc repro` to make it") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ManifestError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; run `dvc repro` to remake it") from None
    for name, expected in manifest.files.items():
        if Path(name).name != name:
            raise ManifestError(f"{path}: files names {name!r}; expected a file beside the manifest")
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise ManifestError(f"{folder / name}: {error.strerror}; it is listed in {path}") from None
        if found != expected:
            raise ManifestError(f"{folder / name}: sha256 is {found[:12]}…, the manifest says {expected[:12]}…; export again")
    return manifest
