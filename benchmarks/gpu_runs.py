"""Steps of benchmarks.gpu with complete training runs: minutes and test accuracy. They call benchmarks.accuracy."""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.accuracy import (
    PLUS,
    comparison_folder,
    format_mean_std,
    merged,
    methods,
    recipe_params,
    train_all,
)
from benchmarks.training import GOAL_MINUTES
from benchmarks.training_setup import generate_images
from pipeline import teacher
from pipeline.params import Params

Figures = Iterator[tuple[str, float | str, str]]
CIFAR10 = Path("recipes/cifar10-parquet-if100.yaml")
PLANKTON = Path("benchmarks/gpu_plankton.yaml")
METHODS = ("balanced softmax", "gml", "cross-entropy", "plus")
SEEDS = [0, 1, 2]
TINY_STAGE = {"backbone": "resnet20", "epochs": 1, "batch_size": 16, "schedule": {"warmup_epochs": 0, "milestones": []}}
TINY = {
    "data": {"max_per_class": 16, "imbalance_factor": 8, "validation_per_class": 0},
    "teacher": TINY_STAGE,
    "student": {**TINY_STAGE, "queue_total": 64},
}


def params_of(options: argparse.Namespace, recipe: Path, changes: dict[str, Any]) -> Params:
    """Return the recipe's params on the packs and the device of the command line; at a small size with --tiny."""
    params = merged(recipe_params([recipe], data_of(options)), {"device": options.device, **changes})
    return merged(params, TINY) if options.tiny else params


def data_of(options: argparse.Namespace) -> Path:
    """Return the folder of the packs; without --data, the folder of generated packs (see make_packs)."""
    if options.data is None:
        options.data = options.work / "packs"
        make_packs(options.data)
    return options.data


def make_packs(folder: Path) -> None:
    """Write packs of generated images with the same names and columns, for a test of the command."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, count) in enumerate({"train": 1000, "test": 20}.items()):
        pixels, labels = generate_images(count, seed)
        files = []
        for image in pixels.transpose(0, 2, 3, 1):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "JPEG")
            files.append(stream.getvalue())
        table = pa.table({"image": files, "label": labels.astype(np.int16), "name": [f"{i:04d}" for i in range(count)]})
        for pack in ("cifar10", "plankton"):
            pq.write_table(table, folder / f"{pack}-{name}.parquet")


def cifar10(options: argparse.Namespace) -> Figures:
    """Train teacher and student of the CIFAR-10 recipe with seed 0; yield the minutes of the stages, and accuracies.

    Runs of an earlier call are deleted, because the minutes of a resumed training are not those of a whole one.
    """
    params, plus = params_of(options, CIFAR10, {}), PLUS.absolute()
    with contextlib.chdir(comparison_folder(params, plus, options.work)):
        shutil.rmtree("runs", ignore_errors=True)
        begin, minutes = time.perf_counter(), []
        teacher.run(merged(params, {"seed": 0}), Path("runs/0/teacher"))
        for name, method in (("teacher", "teacher"), ("student", "gml")):
            (run,) = train_all(params, methods(plus), [method], [0])[method]
            minutes.append((time.perf_counter() - begin) / 60)
            begin = time.perf_counter()
            yield f"{name}, minutes", minutes[-1], ""
            yield f"{name}, accuracy on the test images, %", 100 * run["all"], ""
        yield "teacher and student, minutes", sum(minutes), f"≤ {GOAL_MINUTES}"


def cifar10_methods(options: argparse.Namespace) -> Figures:
    """Compare METHODS on CIFAR-10. The runs of step cifar10 are reused."""
    params = params_of(options, CIFAR10, {})
    if options.tiny:
        return compare_methods(options, params, "all", SEEDS[:2], METHODS[:2])
    return compare_methods(options, params, "all", SEEDS, METHODS)


def plankton_32(options: argparse.Namespace) -> Figures:
    """Compare METHODS on plankton at 32 pixels."""
    return _plankton(options, 32)


def plankton_48(options: argparse.Namespace) -> Figures:
    """Compare METHODS on plankton at 48 pixels."""
    return _plankton(options, 48)


def _plankton(options: argparse.Namespace, size: int) -> Figures:
    params = params_of(options, PLANKTON, {"image": {"size": size, "resize_to": size}})
    return compare_methods(options, params, "balanced_accuracy", SEEDS[:1] if options.tiny else SEEDS, METHODS)


def compare_methods(
    options: argparse.Namespace, params: Params, measure: str, seeds: list[int], names: tuple[str, ...]
) -> Figures:
    """Train methods, all seeds of a method at once; yield mean ± std over seeds of `measure` and of its differences.

    Finished runs are stored and not repeated, except for a step that is named by --again.
    """
    plus, begin, scores = PLUS.absolute(), time.perf_counter(), {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(comparison_folder(params, plus, options.work)))
        if options.fresh:
            shutil.rmtree("runs", ignore_errors=True)
        side_by_side = map
        if len(seeds) > 1:
            pool = ProcessPoolExecutor(len(seeds), multiprocessing.get_context("spawn"))  # CUDA cannot be forked
            side_by_side = stack.enter_context(pool).map
        for name in names:
            count = len(seeds)
            runs = list(side_by_side(train_one, [params] * count, [name] * count, seeds, [plus] * count))
            for column in dict.fromkeys((measure, "many", "medium", "few")):
                yield f"{name}: {column}, %", format_mean_std([run[column] for run in runs]), ""
            yield f"{name}: seconds a run, {count} side by side", statistics.median(run["seconds"] for run in runs), ""
            scores[name] = [run[measure] for run in runs]
            for better, other, goal in (
                ("gml", "balanced softmax", "above its std"),
                ("balanced softmax", "cross-entropy", ""),
                ("plus", "gml", "≥ 1.5"),
            ):
                if name in (better, other) and {better, other} <= scores.keys():
                    gains = [a - b for a, b in zip(scores[better], scores[other], strict=True)]
                    yield f"{better} less {other}, points", format_mean_std(gains), goal
    yield "all runs that this call trained, minutes", (time.perf_counter() - begin) / 60, ""


def train_one(params: Params, name: str, seed: int, plus: Path) -> dict[str, Any]:
    """Return the metrics of one method and seed, in the folder of the comparison."""
    return train_all(params, methods(plus), [name], [seed])[name][0]
