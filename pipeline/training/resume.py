"""Checkpoints of an unfinished training run on disk, from which the next process resumes bit-identically.

The folder is beside the stage's output, because DVC removes the output before it runs a stage. Each checkpoint is a
folder that is written atomically. The last two are kept; if one is damaged, the previous one is loaded.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from pipeline.shared.artifacts import whole_folder, write_file, write_json

FORMAT = 1
CHECKPOINTS_KEPT = 2
TENSORS = "tensors.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class Snapshot:
    """One checkpoint: named tensors, and the remaining state as JSON values."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


class RunFolder:
    """Checkpoints of one run. A run with another `fingerprint` (recipe, seed, data set or teacher) starts from scratch."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Write the checkpoint of a global step, then remove all but the last two. Raises OSError that names the file."""
        with whole_folder(self.folder / f"{step:012d}") as folder:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.tensors.items()}
            write_file(folder / TENSORS, safetensors.torch.save(tensors))
            write_json(folder / STATE, {"format": FORMAT, "fingerprint": self.fingerprint, **snapshot.state})
        for old in self._checkpoints()[:-CHECKPOINTS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self) -> Snapshot | None:
        """Load the newest complete checkpoint of this run; None if there is none.

        Checkpoints of another run are removed.
        """
        for folder in reversed(self._checkpoints()):
            try:
                state = json.loads((folder / STATE).read_text(encoding="utf-8"))
                tensors = safetensors.torch.load((folder / TENSORS).read_bytes())
            except (OSError, ValueError, safetensors.SafetensorError):
                continue  # damaged on disk; the previous checkpoint is valid, only older
            if (state.pop("format", None), state.pop("fingerprint", None)) == (FORMAT, self.fingerprint):
                return Snapshot(tensors, state)
        self.clear()
        return None

    def clear(self) -> None:
        """Remove every checkpoint, because the run has finished or another run replaces it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("[0-9]*") if path.is_dir())
