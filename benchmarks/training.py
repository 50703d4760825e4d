"""The training engine against plain GML training: `python -m benchmarks.training [--device cuda] [--data FOLDER]`.

Baseline (benchmarks.plain_training) and engine (pipeline.training.engine) train the CIFAR-10-LT recipe at imbalance
factor 100 on the same images. Before the timing, both get the same views and weights in float64 and must compute the
same losses and gradients. Each then runs in a separate process, in turns, round by round, while the other waits. A
ratio is the median over rounds of baseline / engine, with the smallest and the largest. The CPU time of all threads and
loader workers is printed too, because other work on the machine has little effect on it.

On a machine with other work set OMP_WAIT_POLICY=passive: otherwise torch's threads spin while they wait for one
another, which dominates both wall time and CPU time.

Rows: the three views alone, as input of the network; one teacher or student step (the baseline's views are prepared,
the engine computes them within the step); whole epochs including evaluation. On the CPU a round is a few steps.

  python -m benchmarks.training --data FOLDER --output benchmarks/results/training-cpu.md
  python -m benchmarks.training --data FOLDER --device cuda --full --output benchmarks/results/training-cuda.md
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.machine import add_device_option, gpu_note, hardware, versions
from benchmarks.other_work import OtherWork, quiet_ratio
from benchmarks.training_setup import Setup, objective_of, setup_of
from benchmarks.training_sides import SIDES, difference
from benchmarks.turns import Cost, in_turns
from pipeline.training.engine import Training
from pipeline.training.history import History
from serving.shared.atomic import write_file

ROWS = ("views alone", "teacher step", "student step", "teacher epoch", "student epoch")  # of training_sides.rows
GOALS = {"cpu": "≥ 1.5", "cuda": "≥ 8"}
GOAL_ROW = "student epoch"
EPOCHS = 200
HEADING = (
    "| | baseline images/s | engine images/s | ratio | smallest to largest | processor time ratio | goal |\n"
    "|---|--:|--:|--:|--:|--:|--:|"
)
GOAL_MINUTES = 3


class Timing(NamedTuple):
    """Costs of a row's rounds, paired for baseline and engine; images: trained per round."""

    baseline: list[Cost]
    engine: list[Cost]
    images: int

    def ratios(self, kind: str) -> list[float]:
        """Return baseline / engine, round by round. kind: a field of Cost."""
        return [getattr(a, kind) / getattr(b, kind) for a, b in zip(self.baseline, self.engine, strict=True)]

    def seconds(self, side: str) -> float:
        """Return the median wall seconds of a round."""
        return statistics.median(cost.wall for cost in getattr(self, side))


def whole_run(setup: Setup) -> tuple[float, History, History]:
    """Train teacher and student for all epochs as the stages do; return the seconds and both histories."""
    begin = time.perf_counter()
    teacher, student = objective_of(setup, "teacher"), objective_of(setup, "student")
    histories = []
    for name, objective in (("teacher", teacher), ("student", student)):
        if name == "student":
            objective.teacher.load_state_dict(teacher.model.state_dict())
        params = getattr(setup.params, name)
        training = Training(name, objective, params, setup.params.image, 0, setup.device, engine=setup.params.engine)
        histories.append(training.run(setup.train, setup.test))
    return time.perf_counter() - begin, *histories


def head(arguments: argparse.Namespace, setup: Setup, deviation: float) -> str:
    """Return the head of the report: command, hardware, versions, size of a round, difference of the two sides."""
    waiting = os.environ.get("OMP_WAIT_POLICY")
    setting = f"OMP_WAIT_POLICY={waiting} " if waiting else ""
    command = ["FOLDER" if word == str(arguments.data) else word for word in sys.argv[1:]]
    source = "CIFAR-10 pack" if arguments.data else "generated images"
    return (
        f"`{setting}python -m benchmarks.training {' '.join(command)}`\n\n"
        f"{hardware(arguments.device)}; {versions(arguments.threads)}.\n"
        f"{source} at imbalance factor 100: student {arguments.student}, teacher {arguments.teacher}, batch "
        f"{setup.params.student.batch_size}, K {setup.params.student.queue_total}, AutoAugment and Cutout; engine in "
        f"{setup.params.engine.precision} precision, baseline in float32 with {arguments.workers} loader workers. A round is "
        f"{len(setup.train)} images of training and {len(setup.test)} of evaluation; median of {arguments.rounds} rounds.\n"
        f"Same views, same weights, float64: losses and gradients differ by at most {deviation:.1e} of the largest.\n"
    )


def table(timings: dict[str, Timing], device: str, others: float) -> str:
    """Markdown table of the ratios, with goals. others: share of the cores that other work took."""
    lines = [HEADING]
    for row, timing in timings.items():
        wall, cpu = timing.ratios("wall"), timing.ratios("cpu")
        speeds = [timing.images / timing.seconds(side) for side in ("baseline", "engine")]
        goal = GOALS[device] if row == GOAL_ROW else ""
        ratio = quiet_ratio(f"{statistics.median(wall):.2f}", others)
        lines.append(
            f"| {row} | {speeds[0]:,.0f} | {speeds[1]:,.0f} "
            f"| {ratio} | {min(wall):.2f} to {max(wall):.2f} | {statistics.median(cpu):.2f} | {goal} |"
        )
    return "\n".join(lines) + "\n"


def whole_run_lines(timings: dict[str, Timing], setup: Setup, full: bool) -> str:
    """Wall time of teacher and student for EPOCHS epochs: extrapolated from epoch rows; if `full`, also measured."""
    lines = ["", f"| {EPOCHS} epochs of teacher and student | baseline | engine | goal |", "|---|--:|--:|--:|"]
    minutes = [
        EPOCHS * sum(timings[f"{name} epoch"].seconds(side) for name in ("teacher", "student")) / 60
        for side in ("baseline", "engine")
    ]
    lines.append(f"| extrapolated, minutes | {minutes[0]:.1f} | {minutes[1]:.1f} | ≤ {GOAL_MINUTES} |")
    if full:
        seconds, teacher, student = whole_run(setup)
        lines.append(f"| measured, minutes, with preparation | | {seconds / 60:.1f} | ≤ {GOAL_MINUTES} |")
        accuracies = ", ".join(f"{history[-1]['validation_accuracy']:.4f}" for history in (teacher, student))
        lines += [
            "",
            f"Accuracy on the test images after the last epoch of the measured run: teacher, student {accuracies}.",
        ]
    return "\n".join(lines) + "\n"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The training engine against a plain baseline: one table of ratios.",
        epilog="example: python -m benchmarks.training --data FOLDER --output benchmarks/results/training-cpu.md",
    )
    parser.add_argument(
        "--data", type=Path, help="folder with cifar10-train.parquet and -test.parquet (default: generated images)"
    )
    add_device_option(parser)
    parser.add_argument("--student", help="backbone (default: resnet20 on the CPU, resnet32 on CUDA)")
    parser.add_argument("--teacher", help="backbone (default: resnet32 on the CPU, resnet56 on CUDA)")
    parser.add_argument("--batch", type=int, default=128, help="images per batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps a round (default: 4 on the CPU, a whole epoch on CUDA)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each row (default: 5)")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="of the engine")
    parser.add_argument("--workers", type=int, help="of the baseline's DataLoader (default: one a core, at most 16)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: one a core)")
    parser.add_argument("--full", action="store_true", help=f"also train teacher and student for {EPOCHS} epochs")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    arguments = parser.parse_args(words)
    cuda = arguments.device == "cuda"
    if arguments.data and not (arguments.data / "cifar10-train.parquet").is_file():
        parser.error(
            f"argument --data: {arguments.data} has no cifar10-train.parquet; leave --data out for generated images"
        )
    arguments.student = arguments.student or ("resnet32" if cuda else "resnet20")
    arguments.teacher = arguments.teacher or ("resnet56" if cuda else "resnet32")
    arguments.steps = arguments.steps or (None if cuda else 4)
    if arguments.workers is None:
        arguments.workers = min(len(os.sched_getaffinity(0)), 16)
    return arguments


def main() -> None:
    arguments = parse()
    setup = setup_of(arguments)
    text = head(arguments, setup, difference(setup))
    print(text, flush=True)
    others = OtherWork()
    costs = in_turns(SIDES, setup, ROWS, arguments.rounds, arguments.threads)
    timings = {row: Timing(taken["baseline"], taken["engine"], len(setup.train)) for row, taken in costs.items()}
    text += "\n" + table(timings, arguments.device, others.share())
    if arguments.device == "cuda" or arguments.full:
        text += whole_run_lines(timings, setup, arguments.full)
    if arguments.device == "cpu":
        text += gpu_note("python -m benchmarks.training --data FOLDER --device cuda --full")
    print(text)
    if arguments.output:
        write_file(arguments.output, text)


if __name__ == "__main__":
    main()
