"""Compute the features of all images of the splits with the frozen encoder. An interrupted run resumes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from pipeline.data.assignment import SPLITS
from pipeline.data.stream import ImageStream
from pipeline.features.stored import (
    HASHES,
    SHARD_ROWS,
    StoredFeatures,
    read_shard,
    shard_name,
    split_hashes,
    write_index,
    write_shard,
)
from pipeline.model_io.devices import choose_device
from pipeline.model_io.encoder import LoadedEncoder, load_encoder
from pipeline.params import EncoderParams, Params
from pipeline.shared.artifacts import sha256_of_json, unfinished, whole_folder
from pipeline.shared.errors import StageError
from pipeline.shared.fingerprint import sha256_of_sources
from pipeline.shared.host_memory import keep_freed_memory
from pipeline.shared.progress import progress_bar

# Images of a forward pass. `python -m benchmarks.encoders` prints the best batch of the bare forward pass on a machine.
BATCH = {"cpu": 16, "cuda": 128}


def embed_images(params: Params, section: EncoderParams, output: Path) -> tuple[int, int]:
    """Write the features of all splits to `output`; returns the number of images, and how many were computed now.

    Finished shards of an interrupted run are kept beside `output`; the same command resumes after them, and the result
    is bit-identical. Features of images in the old output are copied. Raises StageError if a feature is not finite or
    another process writes `output`; also raises as `load_encoder` and ImageStream do.
    """
    with _locked(unfinished(output)) as work:
        return _embed(params, section, output, work)


def _embed(params: Params, section: EncoderParams, output: Path, work: Path) -> tuple[int, int]:
    device, encoder = choose_device(params.device), load_encoder(section, params.image)
    encoder.network.to(device, memory_format=torch.channels_last)
    if device.type == "cpu":
        keep_freed_memory()
    hashes = {split: split_hashes(split) for split in SPLITS}
    images, computed, shards, keys = sum(map(len, hashes.values())), 0, dict[str, Path](), dict[str, str]()
    with progress_bar(unit="images") as progress:
        bar = progress.add_task("embed", total=images, rate="")
        for split in SPLITS:
            stage = _SplitEmbedding(params, section, encoder, split, hashes[split], device, (output, work))
            keys[split] = stage.key
            for number, (path, count) in enumerate(stage.run(progress, bar)):
                shards[shard_name(split, number)] = path
                computed += count
    with whole_folder(output) as folder:
        for name, path in shards.items():
            _link(path, folder / name)
        write_index(folder, section, params.image, asdict(encoder.record), keys)
    shutil.rmtree(work, ignore_errors=True)
    return images, computed


class _SplitEmbedding:
    """Computes the features of one split: reads images as a stream, writes finished shards to the second of `folders`.

    key: key of its shards. The name of a finished shard is a hash of its images' hashes. When the split changes after an
    interrupted run, its shards are therefore not overwritten, and their features are still used.
    """

    def __init__(
        self,
        params: Params,
        section: EncoderParams,
        encoder: LoadedEncoder,
        split: str,
        hashes: np.ndarray,
        device: torch.device,
        folders: tuple[Path, Path],
    ) -> None:
        self._split, self._encoder, self._image, self._device = split, encoder, params.image, device
        self._hashes = hashes
        self._section = section if split == "train" else section.model_copy(update={"views": 0})
        self.key = sha256_of_json({"encoder": encoder.key(params.image), **views_key(self._section)})
        self._work, self._done, self._started = folders[1], 0, time.monotonic()
        self._stored = StoredFeatures(self.key)
        # The old output first: which images it has must not depend on how often the stage was interrupted.
        for path in [*sorted(folders[0].glob("*.safetensors")), *sorted(self._work.glob("*.safetensors"))]:
            self._stored.add(path)
        self._stream = ImageStream(
            params.data, params.image, params.stream, split, torch.device("cpu"), exactly=True, hashes=hashes
        )

    def run(self, progress: Progress, bar: int) -> Iterator[tuple[Path, int]]:
        """Write the shards that do not exist yet; yields the file of each shard and the number of images computed now."""
        for start in range(0, len(self._hashes), SHARD_ROWS):
            rows = self._hashes[start : start + SHARD_ROWS]
            path = self._work / f"{self._split}-{hashlib.sha256(rows.tobytes()).hexdigest()}.safetensors"
            done = read_shard(path, self.key)
            if done is not None and np.array_equal(done[HASHES].numpy(), rows):
                progress.update(bar, advance=len(rows))
                yield path, 0
                continue
            missing = self._stored.missing(rows)
            computed: dict[bytes, Tensor] = {}
            progress.update(bar, advance=len(rows) - len(missing))
            for part, features in self._features(missing, start, rows):
                computed |= {rows[row].tobytes(): feature for row, feature in zip(part, features, strict=True)}
                self._done += len(part)
                rate = f"{self._done / (time.monotonic() - self._started):,.0f} images/s"
                progress.update(bar, advance=len(part), rate=rate)
            write_shard(path, self._stored.gather(rows, computed), rows, self.key)
            self._stored.add(path)
            yield path, len(missing)

    def _features(self, missing: list[int], start: int, rows: np.ndarray) -> Iterator[tuple[list[int], Tensor]]:
        chosen = torch.tensor(missing, dtype=torch.int64) + start
        batch = BATCH[self._device.type]
        parts = [missing[first : first + batch] for first in range(0, len(missing), batch)]
        for part, pixels in zip(parts, self._stream.batches(chosen, batch) if parts else (), strict=True):
            features = self._encoder.features(pixels.to(self._device), rows[part], self._image, self._section)
            bad = (~features.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            if bad:
                raise StageError(
                    f"{self._stream.references[start + part[bad[0]]]}: its feature is not finite; are the weights of encoder "
                    f"{self._section.name} damaged?"
                )
            yield part, features


def views_key(section: EncoderParams) -> dict[str, object]:
    """Return the params that the views of an image depend on; an empty dict without views."""
    if not section.views:
        return {"views": 0}
    drawn = section.model_dump(include={"views", "crop_padding", "flip"})
    return {**drawn, "code": sha256_of_sources("pipeline/augment/*.py")}


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Create a folder and hold its lock (flock, released at process exit). Raises StageError if it is locked."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(
                f"{folder}: another `embed` of this project is running; wait until it has finished"
            ) from None
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise StageError(f"{folder}: another `embed` of this project has just finished; run this command again")
        yield folder
    finally:
        os.close(descriptor)


def _link(written: Path, path: Path) -> None:
    """Add a finished shard to the output by a hard link, or by a copy if the file system has no hard links."""
    try:
        os.link(written, path)
    except OSError:
        shutil.copyfile(written, path)
