"""Stage `embed`: compute the feature of every image once with the frozen encoder; writes artifacts/embeddings/."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.command_line import stage_main
from pipeline.params import Params
from pipeline.shared.artifacts import EMBEDDINGS, EMBEDDINGS_INDEX, unfinished, whole_folder, write_json
from serving.shared.terminal import counted


@dataclass(frozen=True)
class Result:
    """Result of the stage. computed: number of images whose features this run computed. encoder: its name, or None."""

    images: int
    computed: int
    encoder: str | None
    output: Path

    def __str__(self) -> str:
        if self.encoder is None:
            return f"no encoder in params.yaml, nothing to compute → {self.output}"
        kept = f"{self.computed:,} computed, {self.images - self.computed:,} stored before"
        return f"{self.encoder}: features of {counted(self.images, 'image')}, {kept} → {self.output}"


def run(params: Params, output: Path = EMBEDDINGS) -> Result:
    """Compute the features that are not stored yet; without section `encoder`, write an empty index.

    Raises as `embed_images` does.
    """
    if params.encoder is None:
        with whole_folder(output) as folder:
            write_json(folder / EMBEDDINGS_INDEX.name, {"encoder": None})
        shutil.rmtree(unfinished(output), ignore_errors=True)
        return Result(0, 0, None, output)
    from pipeline.features.compute import embed_images  # loading PyTorch takes seconds

    images, computed = embed_images(params, params.encoder, output)
    return Result(images, computed, params.encoder.name, output)


if __name__ == "__main__":
    sys.exit(stage_main(run, "Compute the features of all images once with the frozen encoder."))
