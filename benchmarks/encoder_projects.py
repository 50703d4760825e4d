"""Projects of the encoder benchmarks: Tailor's stages write split, prior and stored features of a data set.

    python -m benchmarks.encoder_projects plankton --data DIR --encoder efficientnet_lite0 --size 112

The folder of a project is WORK/<data set>-<encoder>-<size>. Finished stages are not repeated; an interrupted `embed`
resumes. Its params.yaml, for `tailor methods compare`, has the student with a contrast term.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.accuracy import merged
from models.networks.encoders import ENCODERS
from pipeline import embed, prior, split
from pipeline.params import PARAMS_FILE, Params, parse_params
from pipeline.params.recipe import apply_recipe
from pipeline.shared.artifacts import EMBEDDINGS_INDEX, PRIOR, SPLIT

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/photographs-lite0.yaml"
WORK = Path("build/encoders")
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# Student with a contrast term, for a recipe without one. Chosen on validation (docs/experiments-encoders.md).
GML_STUDENT: dict[str, Any] = {
    "beta": 1.0, "alpha": 0.0, "adapter": 128, "queue_total": 1024, "queue_minimum": 2, "projection_dim": 64,
    "projection_hidden": 128, "epochs": 10, "batch_size": 256, "learning_rate": 0.03, "weight_decay": 0.01,
}  # fmt: skip

# Chosen before a measurement, not by one. Equal networks with and without L_GML: no adapter, as the encoder is trained.
TUNED_STUDENT: dict[str, Any] = {
    "tune": "last_blocks", "tune_blocks": 2, "tune_rate": 0.1, "optimizer": "adamw", "learning_rate": 0.001,
    "weight_decay": 0.01, "gradient_clip": 1.0, "epochs": 5, "batch_size": 64, "adapter": 0,
}  # fmt: skip

# Changes of section `data`. Validation is held out of train: at most 10 images and a fifth of a class. CIFAR-10: 100 images
# per class, from the images that the profile drops (except in the largest class).
HELD_OUT = {"validation_per_class": 10, "validation_share": 0.2}
DATA_SETS: dict[str, dict[str, Any]] = {
    "plankton": {
        "profile": "natural",
        "table": {"train": "plankton-train.parquet", "test": "plankton-test.parquet", "id": "name"},
        **HELD_OUT,
    },
    "tiny-imagenet-lt": {
        "profile": "natural",
        "table": {"train": "tiny-imagenet-lt-train.parquet", "test": "tiny-imagenet-val.parquet", "id": "name"},
        **HELD_OUT,
    },
    "cifar10-if100": {
        "profile": "exponential",
        "imbalance_factor": 100,
        "table": {
            "train": "cifar10-train.parquet",
            "test": "cifar10-test.parquet",
            "id": "name",
            "class_names": CIFAR_CLASSES,
        },
        "validation_per_class": 100,
        "validation_share": 0.02,
    },
}
# Of a report on the data set: whether the encoder was trained on its classes.
NOTES = {
    "tiny-imagenet-lt": "The encoder was trained on ImageNet, which has these classes: the figures profit from pretraining "
    "more than those of CIFAR-10 and plankton, whose images are not of ImageNet.",
    "cifar10-if100": "The encoder was trained on ImageNet, which does not have these images.",
    "plankton": "The encoder was trained on ImageNet, which does not have these images.",
}


def project_params(data_set: str, location: Path, encoder: str, size: int, views: int = 0) -> Params:
    """Return the params of a data set with the recipe of a frozen encoder. location: folder of the Parquet files."""
    text, _ = apply_recipe([RECIPE], ROOT / "params.yaml")
    known = ENCODERS[encoder]
    changes = {
        "data": {"source": "table", "location": str(location.absolute()), **DATA_SETS[data_set]},
        "image": {
            "size": size, "resize_to": size, "mean": list(known.mean), "std": list(known.std),
            "interpolation": known.interpolation,
        },
        "encoder": {"name": encoder, "views": views, "crop_padding": size // 8},
        "device": "cpu",
    }  # fmt: skip
    return merged(parse_params(yaml.safe_load(text), RECIPE), changes)


def gml_params(params: Params, keys: str = "teacher") -> Params:
    """Return params whose student has the contrast term with these keys, student.contrast_encoder."""
    if not params.student.beta:
        params = merged(params, {"student": GML_STUDENT})
    text = {"text": {"encoder": "features", "file": "unused"}} if "text" in keys else {}
    return merged(params, {"student": {"contrast_encoder": keys}, **text})


def tuned_params(params: Params) -> Params:
    """Return params whose student trains the encoder's last two blocks on images, as docs/encoders.md proposes to start."""
    augment = {"crop_padding": params.image.size // 8, "flip": True}
    return merged(params, {"student": TUNED_STUDENT | {"augment": augment}})


def project_folder(work: Path, data_set: str, params: Params) -> Path:
    """Return the folder of a project. Features with augmented views have a separate folder."""
    assert params.encoder is not None
    views = f"-views{params.encoder.views}" if params.encoder.views else ""
    return work / f"{data_set}-{params.encoder.name.replace('_', '-')}-{params.image.size}{views}"


def prepare(params: Params, folder: Path) -> None:
    """Run the stages split, prior and embed in `folder`, except stages whose output exists."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(folder):
        for stage, output in ((split, SPLIT / "classes.json"), (prior, PRIOR), (embed, EMBEDDINGS_INDEX)):
            if not output.is_file():
                print(stage.run(params), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder_projects", description=__doc__.splitlines()[0])
    add_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    params = project_params(options.data_set, options.data, options.encoder, options.size, options.views)
    folder = project_folder(options.work, options.data_set, params)
    prepare(params, folder)
    content = yaml.safe_dump(gml_params(params).model_dump(mode="json"))
    (folder / PARAMS_FILE).write_text(content, encoding="utf-8")
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that identify a project."""
    parser.add_argument("data_set", choices=list(DATA_SETS))
    parser.add_argument("--data", type=Path, required=True, help="folder of the Parquet files")
    parser.add_argument("--encoder", default="efficientnet_lite0", choices=list(ENCODERS))
    parser.add_argument("--size", type=int, default=224, help="image side in pixels (default: %(default)s)")
    parser.add_argument("--views", type=int, default=0, help="stored augmented views of a training image (default: 0)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the projects (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
