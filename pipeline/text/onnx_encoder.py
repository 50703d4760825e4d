"""Text encoder in an ONNX graph with its tokenizer.json, run by ONNX Runtime; needs no PyTorch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.params import TextParams
from pipeline.shared.errors import ParamsError
from pipeline.text.encoder import TextEncoder, checked_file, not_installed, pooled

if TYPE_CHECKING:
    import onnxruntime
    from tokenizers import Tokenizer

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
LARGEST_GRAPH = 2 * 2**30 - 1  # bytes of an ONNX file: a limit of protobuf


@dataclass(frozen=True)
class _Graph:
    """Tokenizer and graph. limit: tokens of the longest input."""

    text: TextParams
    tokenizer: Tokenizer
    session: onnxruntime.InferenceSession
    limit: int

    def lengths(self, sentences: Sequence[str]) -> list[int]:
        self.tokenizer.no_truncation()
        return [len(encoded.ids) for encoded in self.tokenizer.encode_batch(list(sentences))]

    def features(self, sentences: Sequence[str]) -> np.ndarray:
        """Features float32 [n,D]. Raises ParamsError if the graph cannot run the tokens."""
        self.tokenizer.enable_truncation(self.limit)
        encoded = self.tokenizer.encode_batch(list(sentences))
        arrays = {name: np.zeros((len(encoded), max(len(entry.ids) for entry in encoded)), np.int64) for name in INPUTS}
        arrays["position_ids"][:] = np.arange(arrays["position_ids"].shape[1])
        for row, entry in enumerate(encoded):
            arrays["input_ids"][row, : len(entry.ids)] = entry.ids
            arrays["attention_mask"][row, : len(entry.ids)] = entry.attention_mask
            arrays["token_type_ids"][row, : len(entry.ids)] = entry.type_ids
        types = {entry.name: np.int32 if "int32" in entry.type else np.int64 for entry in self.session.get_inputs()}
        feeds = {name: arrays[name].astype(dtype) for name, dtype in types.items()}
        try:
            [result] = self.session.run([self.session.get_outputs()[0].name], feeds)
        except _errors() as error:
            raise ParamsError(
                f"text.file: {self.text.file} cannot run the tokens of {self.text.tokenizer} (do they belong together, is "
                f"text.max_tokens, {self.limit}, within the limit of the encoder?): {_reason(error)}"
            ) from None
        mask = arrays["attention_mask"]
        return np.asarray(result if result.ndim == 2 else pooled(result, mask, self.text.pooling), np.float32)


def onnx_encoder(text: TextParams) -> TextEncoder:
    """Open the graph and the tokenizer of section `text`. Raises as `open_encoder` does."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime reads it at its import, else it writes a file
    try:
        import onnxruntime  # noqa: F401 - used by _session
        import tokenizers
    except ImportError as error:
        raise not_installed(text, error) from None
    path, tokenizer_sha256 = checked_file(str(text.tokenizer), None, text.download, "text.tokenizer")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other class
        raise ParamsError(
            f"text.tokenizer is {text.tokenizer!r}, which is no tokenizer.json: {_reason(error)}"
        ) from None
    limit = text.max_tokens or (tokenizer.truncation or {}).get("max_length")
    if not limit:
        raise ParamsError(
            f"text.max_tokens is null, and {text.tokenizer} has no limit either; set the longest input of the encoder"
        )
    tokenizer.no_padding()
    session, sha256 = _session(text)
    graph = _Graph(text, tokenizer, session, limit)
    record: dict[str, Any] = {
        "encoder": "onnx", "model": Path(text.file).name, "sha256": sha256, "tokenizer_sha256": tokenizer_sha256,
        "pooling": text.pooling, "max_tokens": limit,
    }  # fmt: skip
    return TextEncoder(record, limit, graph.lengths, graph.features)


def _session(text: TextParams) -> tuple[onnxruntime.InferenceSession, str]:
    """Open the graph of text.file in ONNX Runtime; returns it and the sha256 of the file."""
    import onnxruntime

    path, sha256 = checked_file(text.file, text.sha256, text.download)
    if (size := path.stat().st_size) > LARGEST_GRAPH:
        raise ParamsError(f"text.file: {path}: has {size:,} bytes, above the limit of {LARGEST_GRAPH:,}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ParamsError(f"text.file: {path}: has changed while it was read; run the stage again")
    try:
        # From bytes: the graph then cannot read further files, which the sha256 does not cover.
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except _errors() as error:
        raise ParamsError(f"text.file is {text.file!r}, which ONNX Runtime cannot load: {_reason(error)}") from None
    names = [entry.name for entry in session.get_inputs()]
    rank = len(session.get_outputs()[0].shape)
    if "input_ids" not in names or set(names) - set(INPUTS) or rank not in (2, 3):
        raise ParamsError(
            f"text.file is {text.file!r}, a graph with the inputs {', '.join(names)} and an output of rank {rank}; expected a "
            f"text encoder with inputs among {', '.join(INPUTS)} and an output [n,D] or [n,tokens,D]"
        )
    return session, sha256


def _errors() -> tuple[type[Exception], ...]:
    """The exceptions of ONNX Runtime, which have no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(entry for entry in vars(state).values() if isinstance(entry, type) and issubclass(entry, Exception))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
