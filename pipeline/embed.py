"""Stage `embed`: compute the feature of every image once with the frozen encoder; writes artifacts/embeddings/."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from pipeline.command_line import stage_main
from pipeline.data.assignment import SPLITS
from pipeline.data.embeddings import (
    HASHES,
    SHARD_ROWS,
    StoredFeatures,
    bad_rows,
    read_shard,
    shard_name,
    split_hashes,
    write_index,
    write_shard,
)
from pipeline.data.stream import ImageStream
from pipeline.model_io.devices import choose_device
from pipeline.model_io.encoder import LoadedEncoder, load_encoder
from pipeline.params import EncoderParams, Params
from pipeline.shared.artifacts import EMBEDDINGS, sha256_of_json, unfinished, whole_folder, write_json
from pipeline.shared.errors import StageError
from pipeline.shared.progress import progress_bar
from serving.shared.terminal import counted

# Images of a forward pass. EfficientNet-Lite0 at 224 pixels: 28 images per second of processor time with 8, 19 with 32,
# whose activations do not fit into the cache.
BATCH = {"cpu": 8, "cuda": 128}


@dataclass(frozen=True)
class Result:
    """Numbers of images, and of those whose features were computed now. encoder: its name; None without an encoder."""

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
    """Compute the features that are not stored yet, shard by shard; without section `encoder`, write an empty index.

    Finished shards of an interrupted run are kept beside `output`; the same command resumes after them, and the result
    is bit-identical. Features of images that were there before are copied from the old output. Raises StageError for a
    feature that is not finite, and the errors of `load_encoder` and ImageStream.
    """
    section = params.encoder
    if section is None:
        with whole_folder(output) as folder:
            write_json(folder / "index.json", {"encoder": None})
        shutil.rmtree(unfinished(output), ignore_errors=True)
        return Result(0, 0, None, output)
    device, encoder = choose_device(params.device), load_encoder(section, params.image)
    encoder.network.to(device, memory_format=torch.channels_last)
    work = unfinished(output)
    work.mkdir(parents=True, exist_ok=True)
    hashes = {split: split_hashes(split) for split in SPLITS}
    images, computed = sum(map(len, hashes.values())), 0
    with progress_bar(unit="images") as progress:
        bar = progress.add_task("embed", total=images, rate="")
        for split in SPLITS:
            stage = _SplitEmbedding(params, section, encoder, split, device, (output, work))
            computed += sum(stage.run(hashes[split], progress, bar))
    with whole_folder(output) as folder:
        for split in SPLITS:
            for number in range(-(-len(hashes[split]) // SHARD_ROWS)):
                _link(work / shard_name(split, number), folder / shard_name(split, number))
        write_index(folder, section, params.image, asdict(encoder.record))
    shutil.rmtree(work, ignore_errors=True)
    return Result(images, computed, section.name, output)


class _SplitEmbedding:
    """The features of one split: reads images as a stream, writes finished shards to the second of `folders`."""

    def __init__(
        self,
        params: Params,
        section: EncoderParams,
        encoder: LoadedEncoder,
        split: str,
        device: torch.device,
        folders: tuple[Path, Path],
    ) -> None:
        self._split, self._encoder, self._image, self._device = split, encoder, params.image, device
        self._section = section if split == "train" else section.model_copy(update={"views": 0})
        self._key = sha256_of_json({"encoder": encoder.key(params.image), **views_key(self._section)})
        self._work, self._done, self._started = folders[1], 0, time.monotonic()
        self._stored = StoredFeatures(self._key)
        # The old output first: whether an image is in it must not depend on how often the stage was interrupted.
        for path in [*sorted(folders[0].glob("*.safetensors")), *sorted(self._work.glob("*.safetensors"))]:
            self._stored.add(path)
        self._stream = ImageStream(params.data, params.image, params.stream, split, torch.device("cpu"), exactly=True)

    def run(self, hashes: np.ndarray, progress: Progress, bar: int) -> Iterator[int]:
        """Write the shards of a split that do not exist yet; yields the number of computed images of each."""
        for number, start in enumerate(range(0, len(hashes), SHARD_ROWS)):
            rows = hashes[start : start + SHARD_ROWS]
            path = self._work / shard_name(self._split, number)
            done = read_shard(path, self._key)
            if done is not None and np.array_equal(done[HASHES].numpy(), rows):
                progress.update(bar, advance=len(rows))
                yield 0
                continue
            missing = self._stored.missing(rows)
            computed: dict[bytes, Tensor] = {}
            progress.update(bar, advance=len(rows) - len(missing))
            for part, features in self._features(missing, start, rows):
                computed |= {rows[row].tobytes(): feature for row, feature in zip(part, features, strict=True)}
                self._done += len(part)
                rate = f"{self._done / (time.monotonic() - self._started):,.0f} images/s"
                progress.update(bar, advance=len(part), rate=rate)
            write_shard(path, self._stored.gather(rows, computed), rows, self._key)
            self._stored.add(path)
            yield len(missing)

    def _features(self, missing: list[int], start: int, rows: np.ndarray) -> Iterator[tuple[list[int], Tensor]]:
        chosen = torch.tensor(missing, dtype=torch.int64) + start
        batch = BATCH[self._device.type]
        parts = [missing[first : first + batch] for first in range(0, len(missing), batch)]
        for part, pixels in zip(parts, self._stream.batches(chosen, batch) if parts else (), strict=True):
            # The draws of the views depend on the images alone, so that a resumed run repeats them.
            digest = hashlib.sha256(rows[part].tobytes()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            features = self._encoder.features(pixels.to(self._device), self._image, self._section, generator)
            if bad := bad_rows(features):
                raise StageError(
                    f"{self._stream.references[start + part[bad[0]]]}: its feature is not finite; are the weights of encoder "
                    f"{self._section.name} damaged?"
                )
            yield part, features


def views_key(section: EncoderParams) -> dict[str, object]:
    """The params that the views depend on; none without views."""
    return section.model_dump(include={"views", "crop_padding", "flip"}) if section.views else {"views": 0}


def _link(written: Path, path: Path) -> None:
    """Add a finished shard to the output: a hard link, or a copy where the file system has none."""
    try:
        os.link(written, path)
    except OSError:
        shutil.copyfile(written, path)


if __name__ == "__main__":
    sys.exit(stage_main(run, "Compute the features of all images once with the frozen encoder."))
