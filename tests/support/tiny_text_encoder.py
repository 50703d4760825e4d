"""A text encoder of a few words, written as ONNX graph and tokenizer.json: a vector for each token, drawn at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pipeline.params import TextParams

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *["a", "photo", "of", "cat", "dog", ".", "the", "sleeps", "barks", "собака"],
)
WIDTH = 8


def vectors() -> np.ndarray:
    """The vector of each token, float32 [words,WIDTH]."""
    return np.random.default_rng(5).standard_normal((len(WORDS), WIDTH)).astype(np.float32)


def write_tokenizer(path: Path, limit: int | None = 12) -> Path:
    """Write tokenizer.json; tokens of a sentence: [CLS], its words, [SEP]."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    if limit:
        tokenizer.enable_truncation(limit)
    tokenizer.save(str(path))
    return path


def write_graph(path: Path, rows: int = len(WORDS), name: str = "input_ids") -> Path:
    """Write a graph whose output is the vector of each token, [n,tokens,WIDTH]. rows: tokens that it has."""
    graph = helper.make_graph(
        [helper.make_node("Gather", ["vectors", name], ["last_hidden_state"])],
        "text",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "tokens"])],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["n", "tokens", WIDTH])],
        [numpy_helper.from_array(vectors()[:rows], "vectors")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def tiny_text(root: Path, **changes: Any) -> TextParams:
    """Section `text` with the encoder, whose files are written to `root`."""
    files = {"file": str(write_graph(root / "text.onnx")), "tokenizer": str(write_tokenizer(root / "tokenizer.json"))}
    return TextParams(**{"encoder": "onnx", "templates": ["a photo of a {}."], **files, **changes})


def expected_features(sentences: list[str], limit: int = 12) -> np.ndarray:
    """Unit means of the vectors of the tokens, computed here, float64 [N,WIDTH]."""
    rows = []
    for sentence in sentences:
        words = sentence.lower().replace(".", " .").split()[: limit - 2]
        tokens = [WORDS.index(word) if word in WORDS else 1 for word in ["[CLS]", *words, "[SEP]"]]
        mean = vectors()[tokens].astype(np.float64).mean(0)
        rows.append(mean / np.linalg.norm(mean))
    return np.array(rows)
