"""Generate photograph-sized JPEGs for benchmarks.loader: mosaics of the pictures of a pack, or of random ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZES = [(500, 375), (375, 500), (500, 333)]  # pixels: the most frequent sizes in ImageNet
QUALITY = 90
CLASSES, FEW = 10, 48
PACK = "tiny-imagenet-val.parquet"


def photographs(root: Path, count: int, pack: Path | None) -> None:
    """Write `count` JPEGs of SIZES under root/<class>/ (mosaics of small pictures) and their split tables.

    root/train.parquet lists all of them, root/few.parquet the first FEW, root/none.parquet none.
    """
    rng = np.random.default_rng(0)
    if pack:
        small = pq.read_table(pack, columns=["image"]).column(0)
        tiles = [Image.open(io.BytesIO(small[int(i)].as_py())) for i in rng.permutation(len(small))[:600]]
    else:
        tiles = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(600)]
    references = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        photograph, side = Image.new("RGB", (width, height)), -(-max(width, height) // 4)
        for cell in range(16):
            tile = tiles[int(rng.integers(len(tiles)))].convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            photograph.paste(tile, (cell % 4 * side, cell // 4 * side))
        references.append(f"{number % CLASSES:03d}/{number:05d}.jpg")
        path = root / references[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.save(path, quality=QUALITY)
    labels = pa.array([number % CLASSES for number in range(count)], pa.int32())
    table = pa.table({"sample_id": references, "label": labels, "reference": references})
    for name, rows in (("train", count), ("few", FEW), ("none", 0)):
        pq.write_table(table.slice(0, rows), root / f"{name}.parquet")
