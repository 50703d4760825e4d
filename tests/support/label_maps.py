"""Small data sets with label maps, and params of task segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.params import Params
from tests.support.making import encode, params, picture, table, write

CLASSES = ["road", "car", "sign"]
SIZE = (24, 32)  # height and width

SETTINGS: dict[str, Any] = {
    "task": "segmentation", "data.profile": "natural", "data.test_per_class": 2, "data.validation_per_class": 2,
    "data.label_map": {"class_names": CLASSES}, "data.seed": 0,
    "segmentation": {
        "canvas": list(SIZE), "queries": 64, "keys": 32, "keys_per_class": 4,
        "augment": {"crop": list(SIZE), "ratio": [0.75, 1.5]},
    },
    "student.alpha": 0.0, "student.train_tau_g": False, "student.tau_g": 0.07, "device": "cpu",
}  # fmt: skip
for _section in ("teacher", "student"):
    SETTINGS |= {
        f"{_section}.backbone": "resnet20", f"{_section}.tau_s": 0.05, f"{_section}.epochs": 2, f"{_section}.batch_size": 4,
        f"{_section}.schedule": {"kind": "poly", "warmup_epochs": 0},
    }  # fmt: skip


def segmentation_params(location: Path, source: str = "folder", **changes: Any) -> Params:
    """Return params of task segmentation for a small source; changes: dotted keys with `__` for the dots."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return params({**SETTINGS, "data.location": str(location), "data.source": source, **dotted})


def labels(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Return a label map uint8 [H,W]: mostly class 0, a box of class 1, one or two pixels of class 2, a row without a class."""
    generator = np.random.default_rng(seed)
    made = np.zeros(size, dtype=np.uint8)
    top, left = generator.integers(1, size[0] // 2), generator.integers(0, size[1] // 2)
    made[top : top + size[0] // 3, left : left + size[1] // 3] = 1
    made[-1, : 1 + seed % 2] = 2
    made[0] = 255
    return made


def scene(made: np.ndarray, seed: int) -> np.ndarray:
    """Return an image uint8 [H,W,3] that shows the classes of a label map by their colour, with noise."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[:3] = [[60, 60, 60], [200, 40, 40], [40, 40, 220]]
    return np.clip(colours[made].astype(int) + picture(seed, made.shape) // 8, 0, 255).astype(np.uint8)


def label_map_folder(root: Path, count: int = 12, prefix: str = "", size: tuple[int, int] = SIZE) -> Path:
    """Write folders `images` and `annotations` with a number of pairs."""
    for number in range(count):
        made = labels(number, size)
        write(root / "images" / prefix / f"{number:03d}.jpg", encode(scene(made, number), "JPEG", quality=95))
        write(root / "annotations" / prefix / f"{number:03d}.png", encode(made))
    return root


def label_map_table(path: Path, splits: list[str]) -> Path:
    """Write a Parquet file with the columns image, label_map, split and name; a row for each entry of `splits`."""
    maps = [labels(number) for number in range(len(splits))]
    return table(
        path,
        {
            "image": [encode(scene(made, number)) for number, made in enumerate(maps)],
            "label_map": [encode(made) for made in maps],
            "split": splits,
            "name": [f"scene-{number}" for number in range(len(splits))],
        },
    )


def palette(made: np.ndarray) -> bytes:
    """Encode a label map as a PNG with a palette, whose colours are not the labels."""
    image = Image.fromarray(made)
    image.putpalette([255 - value // 3 for value in range(768)])
    return encode(image)
