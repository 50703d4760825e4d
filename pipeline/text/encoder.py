"""What the text encoders share: the opened encoder, the check of its file, pooling, and the batches of sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.params import TextParams
from pipeline.shared.artifacts import sha256_of
from pipeline.shared.errors import ParamsError, install_command
from pipeline.shared.progress import progress_bar


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder on the CPU. record: `encoder`, `model`, `sha256` of its weights, and what else a feature depends on.

    limit: tokens of the longest sentence. lengths: number of tokens of each sentence, uncut. features: float32 [n,D],
    not normalised; longer sentences are cut.
    """

    record: dict[str, Any]
    limit: int
    lengths: Callable[[Sequence[str]], list[int]]
    features: Callable[[Sequence[str]], np.ndarray]

    def encode(self, sentences: Sequence[str], batch_size: int) -> tuple[np.ndarray, int]:
        """Features float32 [N,D] of the sentences, and the number of sentences that were cut.

        Sentences of similar length share a batch. Batches are the same for the same sentences in any order.
        """
        lengths = self.lengths(sentences)
        order = sorted(range(len(sentences)), key=lambda row: (lengths[row], sentences[row]))
        batches = []
        with progress_bar(unit="sentences") as progress:
            bar = progress.add_task("embed_text", total=len(sentences), rate="")
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batches.append(self.features([sentences[row] for row in rows]))
                progress.advance(bar, len(rows))
        features = np.empty((len(sentences), batches[0].shape[1]), np.float32)
        features[order] = np.concatenate(batches)
        return features, sum(length > self.limit for length in lengths)


def checked_file(source: str, sha256: str | None, download: bool, key: str = "text.file") -> tuple[Path, str]:
    """Find a file and compute its sha256. Raises ParamsError that names `key`, or text.sha256 if it differs from `sha256`."""
    path = Path(source)
    if source.startswith(("package:", "hf://")):
        from pipeline.model_io.pretrained import locate  # loads PyTorch, which takes seconds

        path = locate(source, download, key)
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise ParamsError(f"{key} is {source!r}: {error.strerror}; expected a file on this machine") from None
    if sha256 not in (None, actual):
        raise ParamsError(
            f"text.sha256 is {sha256}, but {path} has {actual}; it is another file; set the intended file, or its sha256"
        )
    return path, actual


def not_installed(text: TextParams, error: ImportError) -> ParamsError:
    """The error for a package of the encoder that is not installed."""
    how = "run `pip install transformers`" if error.name == "transformers" else install_command("text", "cpu")
    return ParamsError(f"text.encoder is {text.encoder}, but the package {error.name} is not installed; {how}")


def pooled(tokens: np.ndarray, mask: np.ndarray, pooling: str) -> np.ndarray:
    """Sentence vectors [n,D] of token vectors [n,L,D]: the first one, or the mean over mask [n,L]."""
    if pooling == "first":
        return tokens[:, 0]
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
