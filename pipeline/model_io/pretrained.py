"""Pretrained weights from a local safetensors file: no download, no pickle, checked by sha256."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch

from models.networks.backbones import Backbone
from pipeline.params import PretrainedParams
from pipeline.shared.artifacts import sha256_of
from pipeline.shared.errors import ParamsError


def load_pretrained(backbone: Backbone, pretrained: PretrainedParams | None, key: str) -> None:
    """Load weights from a file into a newly built backbone; does nothing if `pretrained` is None.

    The file holds a state_dict of the same network with its library's names, or a classifier written by Tailor
    (model.safetensors). Raises ParamsError that names the params key if the file does not exist, has another sha256 or
    does not fit.
    """
    if pretrained is None:
        return
    path = Path(pretrained.file)
    try:
        sha256 = sha256_of(path)
    except OSError as error:
        raise ParamsError(
            f"{key}.file is {pretrained.file!r}: {error.strerror}; expected a safetensors file on this machine"
        ) from None
    if sha256 != pretrained.sha256:
        raise ParamsError(f"{key}.sha256 is {pretrained.sha256}, but {path} has {sha256}; it is another file")
    try:
        backbone.load_weights(safetensors.torch.load_file(path))
    except safetensors.SafetensorError as error:
        raise ParamsError(f"{key}.file is {pretrained.file!r}, which is no safetensors file: {error}") from None
    except ValueError as error:
        raise ParamsError(
            f"{key}.file is {pretrained.file!r}, which {error}; does it belong to the backbone?"
        ) from None
