"""Write a folder of images with the list files of published splits."""

from __future__ import annotations

from tests.support.making import png, write

IMAGENET = {
    "ImageNet_LT_train.txt": [
        ("train/n01440764/n01440764_190.JPEG", 0), ("train/n01440764/n01440764_191.JPEG", 0),
        ("train/n01443537/n01443537_24.JPEG", 1), ("train/n01443537/n01443537_25.JPEG", 1),
        ("train/n01484850/n01484850_7.JPEG", 2), ("train/n01484850/n01484850_8.JPEG", 2),
    ],
    "ImageNet_LT_val.txt": [(f"train/n014{n}/n014{n}_9.JPEG", c) for c, n in enumerate(("40764", "43537", "84850"))],
    "ImageNet_LT_test.txt": [
        ("val/n01440764/ILSVRC2012_val_00000293.JPEG", 0), ("val/n01443537/ILSVRC2012_val_00000236.JPEG", 1),
        ("val/n01484850/ILSVRC2012_val_00002338.JPEG", 2),
    ],
}  # fmt: skip


def tree(root, lists, folder="", missing=()):
    root.mkdir(parents=True, exist_ok=True)
    seed = 0
    for name, entries in lists.items():
        lines = "".join(f"{path} {label}\n" for path, label in entries)
        write(root / folder / name, lines.encode())
        for path, _ in entries:
            seed += 1
            if path not in missing:
                write(root / path, png(seed))
    return root


PLACES = {
    f"Places_LT_{part}.txt": [
        (f"data_256/a/airfield/{part}1.jpg", 0), (f"data_256/a/airfield/{part}2.jpg", 0),
        (f"data_256/a/apartment_building/outdoor/{part} 1.jpg", 1), (f"data_256/b/bar/{part}1.jpg", 2),
    ] for part in ("train", "val", "test")
}  # fmt: skip
