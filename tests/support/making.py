"""Make small real inputs for tests: params, encoded images, folders and tables of images."""

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml
from PIL import Image

from pipeline.params import Params, parse_params
from pipeline.sources import Row

ROOT = Path(__file__).parents[2]
SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def content(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the shipped params.yaml as a mapping with dotted keys set; the value None is YAML's null."""
    made = copy.deepcopy(SHIPPED)
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        section = made
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = copy.deepcopy(value)  # a later key inside it must not change the caller's value
    return made


def params(changes: dict[str, Any] | None = None) -> Params:
    """Return the shipped params with dotted keys set, validated."""
    return parse_params(content(changes), Path("params.yaml"))


def data_params(location: Path, source: str = "folder", **changes: Any) -> Params:
    """Return params for a small source: all images used, two test images and one validation image per class."""
    settled = {
        "source": source, "location": str(location), "profile": "natural", "test_per_class": 2,
        "validation_per_class": 1, "validation_share": 0.5, "seed": 0, **changes,
    }  # fmt: skip
    return params({f"data.{key}": value for key, value in settled.items()})


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """Return random pixels uint8 [H,W,3], different for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def encode(pixels: np.ndarray | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Encode an image as the bytes of a file."""
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, form, **options)
    return stream.getvalue()


def png(seed: int) -> bytes:
    """Return a PNG, different for each seed."""
    return encode(picture(seed))


def write(path: Path, data: bytes) -> Path:
    """Write a file and create its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def folder(root: Path, sizes: dict[str, int]) -> Path:
    """Write a folder of images, all different. sizes: number of images by class path."""
    seed = 0
    for place, size in sizes.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for number in range(size):
            write(root / place / f"{number:03d}.png", png(seed := seed + 1))
    return root


def table(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write a Parquet file, or a CSV file for the suffix .csv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        rows = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def rows_of(counts, split_name="train", start=0):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return [Row(f"{split_name}{i}", label, f"{split_name}{i}", split_name) for i, label in enumerate(labels, start)]
