"""Training speed of an ImageNet recipe from files to weights, and the cost of each option that saves memory.

A data set with ImageNet's sizes (benchmarks.made_imagenet, or the real one) passes through the stages `split` and
`prior`; then the student is trained for one epoch by the recipe, with gradient accumulation (`accumulate`), with
activation checkpointing, with both, and on a GPU also in float32. A ratio is a row's images/s divided by those of the
first row; on the CPU the seconds are CPU time, on which other work has little effect. Memory is the peak of the run,
beside the estimate of `tailor memory` for a step.

  python -m benchmarks.made_imagenet imagenet --scale 0.1
  python -m benchmarks.imagenet imagenet --device cuda --output benchmarks/results/imagenet-cuda.md
  python -m benchmarks.imagenet imagenet --size 64 --student torchvision/resnet18 --batch 16 --queue 512
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

import pipeline.prior
import pipeline.split
from benchmarks.machine import add_device_option, gpu_note, hardware, versions
from pipeline.data.class_prior import Prior
from pipeline.data.dataset import AnyImages, load_images, training_images
from pipeline.params import PARAMS_FILE, Params, parse_params
from pipeline.params.recipe import apply_recipe
from pipeline.preparation.gpu_memory import GIB, estimate_memory, new_objective
from pipeline.training.engine import Training
from serving.shared.atomic import write_file

RECIPE = Path("recipes/imagenet-lt-90.yaml")
FLOAT32 = {"engine": {"precision": "float32"}}
ROWS: dict[str, dict[str, Any]] = {
    "as the recipe says": {},
    "in 4 parts": {"student": {"accumulate": 4}},
    "activations computed again": {"engine": {"checkpoint_activations": True}},
    "both": {"student": {"accumulate": 4}, "engine": {"checkpoint_activations": True}},
    "in float32": FLOAT32,
}
HEADING = "| student | images/s | ratio | peak memory, GiB | estimate for a step, GiB |\n|---|--:|--:|--:|--:|"


class TrainingCost(NamedTuple):
    """speed: images/s of a run of one epoch including evaluation. steps: images/s of its steps alone, by wall time.

    peak: peak GiB. estimated: estimated GiB of a step.
    """

    speed: float
    steps: float
    peak: float
    estimated: float


def params_of(arguments: argparse.Namespace, row: dict[str, Any], folder: Path) -> Params:
    """Return the recipe's params with the changes of the command line and of a row."""
    changes: dict[str, Any] = {
        "device": arguments.device,
        "data": {"location": str(arguments.data.resolve())},
        "student": {"epochs": 1},
        "teacher": {"epochs": 1},
        "engine": {"precision": "float32"} if arguments.device == "cpu" else {},
        "stream": {"mode": "on"},  # decode in every row: originals kept by the first row would favour the others
    }
    if arguments.size:
        changes["image"] = {"size": arguments.size, "resize_to": arguments.size * 8 // 7}
    if arguments.queue:
        changes["student"]["queue_total"] = arguments.queue
    for stage in ("teacher", "student"):
        if arguments.batch:
            changes[stage]["batch_size"] = arguments.batch
        if getattr(arguments, stage):
            changes[stage]["backbone"] = getattr(arguments, stage)
    for section, values in row.items():
        changes[section] |= values
    overlay = folder / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"extends": str(arguments.recipe.resolve()), **changes}), encoding="utf-8")
    text, _ = apply_recipe([overlay], arguments.params)
    return parse_params(yaml.safe_load(text), overlay)


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[Params, pipeline.split.Result, Prior, AnyImages]:
    """Split the data in the current folder; return params, split, prior and the training images with three views."""
    params = params_of(arguments, {}, folder)
    split = pipeline.split.run(params)
    prior = pipeline.prior.run(params)
    device = torch.device(arguments.device)
    return params, split, prior, training_images(params, device, augment=params.student.augment, views=3)[0]


def measure_training(
    params: Params, prior: Prior, images: Any, device: torch.device, stage: str = "student"
) -> TrainingCost:
    """Train a stage for one epoch; for the student, an untrained teacher costs the same as a trained one."""
    estimated, section = estimate_memory(params, stage, prior).peak / GIB, getattr(params, stage)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    objective = new_objective(params, stage, prior)
    training = Training(stage, objective, section, params.image, 0, device, engine=params.engine)
    validation = load_images(params.data, params.image, "validation")
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begin = clock()
    record = training.run(images, validation)[-1]
    trained = len(images) // section.batch_size * section.batch_size
    speed = trained / (clock() - begin)
    return TrainingCost(speed, record["images_per_second"], record["memory_mib"] / 1024, estimated)


def table(costs: dict[str, TrainingCost]) -> str:
    """Markdown table of speeds, ratios and memory."""
    first = next(iter(costs.values())).speed
    rows = (
        f"| {name} | {row.speed:,.1f} | {row.speed / first:.2f} | {row.peak:.2f} | {row.estimated:.2f} |"
        for name, row in costs.items()
    )
    return "\n".join([HEADING, *rows]) + "\n"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Throughput and memory of an ImageNet recipe: one table of ratios.",
        epilog="example: python -m benchmarks.imagenet imagenet --device cuda",
    )
    parser.add_argument("data", type=Path, help="root of imagenet_lt: python -m benchmarks.made_imagenet FOLDER")
    add_device_option(parser)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="(default: %(default)s)")
    parser.add_argument("--params", type=Path, default=PARAMS_FILE, help="base params of the recipe")
    parser.add_argument("--size", type=int, help="pixels (default: the recipe's)")
    parser.add_argument("--batch", type=int, help="(default: the recipe's)")
    parser.add_argument("--queue", type=int, help="K (default: the recipe's)")
    parser.add_argument("--student", help="backbone (default: the recipe's)")
    parser.add_argument("--teacher", help="backbone (default: the recipe's)")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    arguments = parser.parse_args(words)
    if not (arguments.data / "ImageNet_LT_train.txt").is_file():
        parser.error(f"argument data: {arguments.data} has no ImageNet_LT_train.txt; make it: benchmarks.made_imagenet")
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    arguments.params, arguments.recipe = arguments.params.resolve(), arguments.recipe.resolve()
    arguments.data = arguments.data.resolve()
    device = torch.device(arguments.device)
    costs = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        folder = Path(scratch)
        params, split, prior, images = prepare(arguments, folder)
        for name, row in ROWS.items():
            if arguments.device == "cpu" and row == FLOAT32:
                continue  # on the CPU every row is in float32
            print(f"{name} ...", file=sys.stderr, flush=True)
            costs[name] = measure_training(params_of(arguments, row, folder), prior, images, device)
    command = " ".join("FOLDER" if word == str(arguments.data) else word for word in (words or sys.argv[1:]))
    text = (
        f"`python -m benchmarks.imagenet {command}`\n\n{hardware(arguments.device)}; {versions(torch.get_num_threads())}.\n"
        f"{len(prior.classes)} classes, {split.sizes['train']:,} training images, {params.image.size} pixels; student "
        f"{params.student.backbone}, teacher {params.teacher.backbone}, batch {params.student.batch_size}, K "
        f"{params.student.queue_total}; one epoch a row. On the CPU `peak memory` is that of the process.\n\n{table(costs)}"
    )
    if arguments.device == "cpu":
        text += gpu_note(
            "python -m benchmarks.imagenet imagenet --device cuda --output benchmarks/results/imagenet-cuda.md"
        )
    print(text)
    if arguments.output:
        write_file(arguments.output, text)


if __name__ == "__main__":
    main()
