"""Steps of benchmarks.gpu that measure speed and memory. They call the other benchmarks.

A step yields (figure, value, goal) as soon as a figure is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from benchmarks import gml_loss as gml
from benchmarks import imagenet, loader, made_imagenet, training
from benchmarks.accuracy import merged
from benchmarks.gml_forms import FUSED, ONE_HOT, OURS, make_case
from benchmarks.gpu_runs import Figures, data_of
from benchmarks.photographs import photographs
from benchmarks.training_setup import Setup, setup_of
from benchmarks.training_sides import SIDES, difference, engine_side
from benchmarks.turns import in_turns
from models.objectives.student import StudentObjective
from pipeline.data.dataset import training_images

CORES = min(len(os.sched_getaffinity(0)), 16)
TINY_TRAINING = "--student resnet20 --teacher resnet20 --batch 16 --steps 2 --workers 1 --threads 1"
TINY_IMAGENET = "--size 64 --student torchvision/resnet18 --teacher torchvision/resnet18 --batch 16 --queue 512"
SATURATED = 0.95  # share of the highest throughput


def gpu_tests(options: argparse.Namespace) -> Figures:
    """Run the tests with the mark `gpu`. Raises RuntimeError if one fails or none ran; pytest's output is in the log."""
    files = [
        str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "@pytest.mark.gpu" in path.read_text("utf-8")
    ]
    report = options.work / "gpu-tests.xml"
    report.unlink(missing_ok=True)  # of an earlier call
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *files]
    code = subprocess.run(command, check=False).returncode
    cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    if not cases:
        raise RuntimeError(f"pytest ran no test and ended with exit code {code}; its output is in log.txt")
    outcomes = {"failure": 0, "error": 0, "skipped": 0}
    for case in cases:
        for outcome in case:
            if outcome.tag in outcomes:
                outcomes[outcome.tag] += 1
                if outcome.tag != "skipped":
                    yield f"{outcome.tag}: {case.get('name')}", (outcome.get("message") or "").split("\n")[0], ""
    yield "tests passed", len(cases) - sum(outcomes.values()), f"{len(cases)}"
    yield "tests skipped", outcomes["skipped"], "0"
    if code:
        raise RuntimeError(f"pytest ended with exit code {code}; its output is in log.txt")


def gml_loss(options: argparse.Namespace) -> Figures:
    """Compare the values of all forms at each size, then measure time and peak memory."""
    for i, size in enumerate([(8, 64, 10)] if options.tiny else gml.SIZES):
        text = "B, K, C = " + ", ".join(map(str, size))
        case = make_case(*size, options.device)
        names = gml.usable_forms(case)
        times = gml.times(case, names, 3 if options.tiny else 50)
        del case
        yield f"{text}: losses and gradients of {len(names)} forms", "equal within 1e-4 of the largest", ""
        medians = {name: statistics.median(values) for name, values in times.items()}
        peaks = {name: gml.peak_here(name, size, options.device) for name in names}
        for name in names:
            ours = name in (OURS, FUSED)
            time_goal, memory_goal = gml.TIME_GOALS["cuda"][i] if ours else "", gml.MEMORY_GOALS[i] if ours else ""
            yield f"{text}: {name}, ms", medians[name], ""
            if name != ONE_HOT:
                goal = f"≥ {time_goal}" if time_goal else ""
                yield f"{text}: time of one-hot over {name}", medians[ONE_HOT] / medians[name], goal
            yield f"{text}: {name}, peak MiB", peaks[name], f"≤ 1/{memory_goal} of one-hot" if memory_goal else ""
        if options.device == "cuda":
            yield f"{text}: fused kernels", gml.kernels_against_plain(size), ""


def training_setup(options: argparse.Namespace, words: str = "") -> tuple[argparse.Namespace, Setup]:
    """Return the arguments of benchmarks.training and its setup on the CIFAR-10 pack."""
    small = TINY_TRAINING if options.tiny else ""
    arguments = training.parse(
        ["--data", str(data_of(options)), "--device", options.device, *words.split(), *small.split()]
    )
    return arguments, setup_of(arguments)


def engine(options: argparse.Namespace) -> Figures:
    """Compare the engine with the plain baseline; the row that has a goal is first."""
    arguments, setup = training_setup(options)
    yield "largest relative difference of losses and gradients in float64", difference(setup), "< 1e-9"
    for rows in (["student step", "student epoch"], ["teacher step", "teacher epoch", "views alone"]):
        for row, costs in in_turns(SIDES, setup, rows, 1 if options.tiny else 3, arguments.threads).items():
            timing = training.Timing(costs["baseline"], costs["engine"], len(setup.train))
            for side in SIDES:
                yield f"{row}: {side}, images/s", timing.images / timing.seconds(side), ""
            goal = training.GOALS["cuda"] if row == training.GOAL_ROW else ""
            yield f"{row}: engine over baseline", statistics.median(timing.ratios("wall")), goal
        if options.tiny:
            return


def images_per_second(setup: Setup, row: str, rounds: int) -> float:
    """Return the engine's speed in a row of benchmarks.training: median of the rounds after a warm-up round."""
    marks: list[float] = []
    engine_side(setup)[row](rounds + 1, marker(setup, marks))
    return len(setup.train) / statistics.median(b - a for a, b in itertools.pairwise(marks))


def marker(setup: Setup, marks: list[float], then: Callable[[int], None] = lambda _: None) -> Callable[[], None]:
    """Return a function to call after each round. It appends the time to marks and calls `then` with their number."""

    def turn() -> None:
        if setup.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        then(len(marks))

    return turn


def with_params(setup: Setup, changes: dict[str, object]) -> Setup:
    """Return the setup with changes of its params."""
    return replace(setup, params=merged(setup.params, changes))


def variants(options: argparse.Namespace) -> Figures:
    """Measure the speed of the student with and without CUDA graph, bfloat16 and the fused kernels."""
    setup, rounds = training_setup(options)[1], 1 if options.tiny else 3
    for row in ("student step",) if options.tiny else ("student step", "student epoch"):
        for precision, capture in itertools.product(("bfloat16", "float32"), (True, False)):
            changed = with_params(setup, {"engine": {"precision": precision, "capture": capture}})
            name = f"{row}: {precision}, {'CUDA graph' if capture else 'no graph'}, images/s"
            yield name, images_per_second(changed, row, rounds), ""
    speeds = []
    for fused in ("auto", False):
        with unittest.mock.patch.object(StudentObjective, "fused_contrast", fused):
            speeds.append(images_per_second(setup, "student step", rounds))
    yield "student step: fused kernels over plain contrast losses", speeds[0] / speeds[1], "≥ 1.05, else delete them"


def kernels(options: argparse.Namespace) -> Figures:
    """Measure the ten most costly kernels of a student step (on the CPU: operators), and the share of idle time."""
    setup, marks, profiler = training_setup(options)[1], [], profile()

    def then(count: int) -> None:
        if count == 1:
            profiler.start()
            marks[-1] = time.perf_counter()  # the first start of the profiler takes seconds
        elif count == 2:
            profiler.stop()

    engine_side(setup)["student step"](2, marker(setup, marks, then))
    steps = len(setup.train) // setup.params.student.batch_size
    cuda = options.device == "cuda"
    kind, field = (DeviceType.CUDA, "self_device_time_total") if cuda else (DeviceType.CPU, "self_cpu_time_total")
    times = [(getattr(e, field) / steps, e.key) for e in profiler.key_averages() if e.device_type == kind]
    total = sum(time for time, _ in times)
    for number, (microseconds, name) in enumerate(sorted(times, reverse=True)[:10], 1):
        yield f"{number}. {name[:90]}, µs a step", microseconds, f"{microseconds / total:.0%} of all kernels"
    yield "all kernels, µs a step", total, ""
    yield "wall time, µs a step, with the profiler", (marks[1] - marks[0]) / steps * 1e6, ""


def batch_sizes(options: argparse.Namespace) -> Figures:
    """Measure the speed of steps by batch size, and find the smallest size with SATURATED of the highest speed."""
    sizes = [8, 16] if options.tiny else [64, 128, 256, 512, 1024, 2048]
    setup = training_setup(options, f"--batch {sizes[-1]}")[1]
    for stage in ("student", "teacher"):
        speeds = {}
        for size in sizes:
            changed = with_params(setup, {stage: {"batch_size": size}})
            speeds[size] = images_per_second(changed, f"{stage} step", 1 if options.tiny else 3)
            yield f"{stage} step, batch {size}, images/s", speeds[size], ""
        enough = next(size for size in sizes if speeds[size] >= SATURATED * max(speeds.values()))
        yield f"{stage} step saturates at batch", enough, ""


def imagenet_recipe(options: argparse.Namespace) -> Figures:
    """Measure speed and memory of the ImageNet recipe and its options on photograph-sized JPEGs, against the estimate."""
    with tempfile.TemporaryDirectory(dir=options.temporary) as folder:
        size = {"classes": 10, "scale": 0.02, "size": (100, 75)} if options.tiny else {"scale": 0.05, "workers": CORES}
        made_imagenet.make(Path(folder) / "data", pack=data_of(options) / "cifar10-train.parquet", **size)
        words = [f"{folder}/data", "--device", options.device, *(TINY_IMAGENET if options.tiny else "").split()]
        arguments = imagenet.parse(words)
        arguments.params, arguments.recipe = arguments.params.absolute(), arguments.recipe.absolute()
        device = torch.device(options.device)
        with contextlib.chdir(folder):
            _, _, prior, images = imagenet.prepare(arguments, Path(folder))
            rows = {**imagenet.ROWS, "as the recipe says, plain contrast losses": {}}
            if options.tiny:
                rows = dict(list(rows.items())[:1])
            for name, row in rows.items():
                fused = False if "plain" in name else "auto"
                with unittest.mock.patch.object(StudentObjective, "fused_contrast", fused):
                    params = imagenet.params_of(arguments, row, Path(folder))
                    cost = imagenet.measure_training(params, prior, images, device)
                yield from speed_and_peak(name, cost)
            params = imagenet.params_of(arguments, {}, Path(folder))
            images = training_images(params, device, augment=params.teacher.augment)[0]
            cost = imagenet.measure_training(params, prior, images, device, "teacher")
            yield from speed_and_peak("training of the teacher", cost)


def speed_and_peak(name: str, cost: imagenet.TrainingCost) -> Figures:
    """Yield speed and peak memory of a row of benchmarks.imagenet."""
    yield f"{name}: images/s of the steps", cost.steps, ""
    yield f"{name}: peak GiB", cost.peak, f"estimate {cost.estimated:.2f}"


def streaming_loader(options: argparse.Namespace) -> Figures:
    """Measure the share of a training step spent waiting for data with nvJPEG, then compare loader and DataLoader."""
    count, batch, workers = (48, 8, 1) if options.tiny else (2048, 256, CORES)
    backbone = "torchvision/mobilenet_v3_small" if options.tiny else "torchvision/resnet50"
    with tempfile.TemporaryDirectory(dir=options.temporary) as folder:
        root = Path(folder)
        photographs(root, count, data_of(options) / "cifar10-test.parquet")
        source = loader.LoaderInput(root, loader.recipe(root, workers, options.device), batch, workers)
        waiting = 100 * loader.wait_share(source, torch.device(options.device), backbone)
        yield f"{backbone}, batch {batch}: waiting for data, %", waiting, f"< {100 * loader.WAIT_GOAL:.0f}"
        source = loader.LoaderInput(root, loader.recipe(root, workers, "cpu"), batch, workers)
        sides = {name: loader.SIDES[name] for name in ("dataloader", "loader", "pixels")[: 2 if options.tiny else 3]}
        costs = in_turns(sides, source, ["epoch"], 1 if options.tiny else 2, 1)["epoch"]
        seconds = {name: statistics.median(cost.wall for cost in taken) for name, taken in costs.items()}
        for name, taken in seconds.items():
            yield f"{loader.NAMES[name]}, images/s", count // batch * batch / taken, ""
        yield "stream over DataLoader", seconds["dataloader"] / seconds["loader"], f"≥ {loader.RATIO_GOAL}"
