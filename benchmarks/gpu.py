"""All measurements that need a GPU, in one command: `python -m benchmarks.gpu --data FOLDER --output FOLDER`.

Runs steps in order of value, each in a separate process with a time limit. A step writes each figure to
OUTPUT/results.json when it is measured. A failed step is recorded with its error, and the next step runs. A later call with
the same output folder skips finished steps, and runs steps that did not fit into the minutes of the earlier call. OUTPUT
contains three files: results.json, table.md, log.txt (the output of the steps). Training runs are stored under --work; the
last three steps resume from there.

  python -m benchmarks.gpu --plan
  python -m benchmarks.gpu --data gpu_pack/data --output OUTPUT --minutes 9
  python -m benchmarks.gpu --device cpu --tiny    # every step at a small size, on generated images, in build/gpu-tiny
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from serving.shared.atomic import write_file

PACKS = ("cifar10-train.parquet", "cifar10-test.parquet", "plankton-train.parquet", "plankton-test.parquet")
FINISHED = ("done", "failed")  # a stopped step runs again
LIMIT = 3  # a step fails when it takes longer, over all calls, than this multiple of its estimate
ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt)(: .*)?$", re.MULTILINE)  # of a Python traceback


class Step(NamedTuple):
    """A step: function `work` (module:function) yields (figure, value, goal). minutes: estimate on one H100.

    resumes: the step may start with less time than its estimate; the next call continues it.
    """

    name: str
    minutes: float
    work: str
    what: str
    resumes: bool = False


SPEED, RUNS = "benchmarks.gpu_speed:", "benchmarks.gpu_runs:"
STEPS = [
    Step("tests", 1, SPEED + "gpu_tests", "every test that needs a GPU"),
    Step("gml-loss", 1, SPEED + "gml_loss", "GML loss, forward and backward, against the one-hot form"),
    Step("engine", 3, SPEED + "engine", "training engine against the plain baseline: steps and epochs"),
    Step("variants", 1.5, SPEED + "variants", "student with and without CUDA graph, bfloat16, fused kernels"),
    Step("kernels", 0.5, SPEED + "kernels", "the ten most costly kernels of a student step"),
    Step("cifar10", 4, RUNS + "cifar10", "CIFAR-10, IF 100: ResNet-56 teacher, ResNet-32 student, 200 epochs"),
    Step("batch-sizes", 1.5, SPEED + "batch_sizes", "batch size at which the throughput of a step saturates"),
    Step("imagenet", 3, SPEED + "imagenet_recipe", "ResNeXt-50, ResNeXt-101 teacher: images/s, memory, estimate"),
    Step("loader", 2, SPEED + "streaming_loader", "streaming loader, and the share of waiting with nvJPEG"),
    Step("encoders", 1.5, "benchmarks.gpu_encoders:encoders", "embedding and LoRA images/s of timm networks"),
    Step("cifar10-methods", 14, RUNS + "cifar10_methods", "CIFAR-10, IF 100: four methods, 3 seeds", True),
    Step("plankton-32", 12, RUNS + "plankton_32", "plankton from scratch at 32 pixels: four methods, 3 seeds", True),
    Step("plankton-48", 18, RUNS + "plankton_48", "plankton from scratch at 48 pixels: four methods, 3 seeds", True),
]
ENOUGH = 1.0  # remaining minutes that a resumable step needs to start


class Results:
    """The records of the steps in OUTPUT/results.json, and the Markdown table of all of them in OUTPUT/table.md."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / "results.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """Return the records by step. Raises ValueError for a file that is not of this command."""
        if not self._file.is_file():
            return {}
        records = json.loads(self._file.read_text(encoding="utf-8"))
        if not isinstance(records, dict) or not all(isinstance(r, dict) and "status" in r for r in records.values()):
            raise ValueError("expected an object with a record, which has a status, for each step")
        return records

    def status(self, step: str) -> str:
        """Return done, failed or stopped; "" for a step that has not run."""
        return self.read().get(step, {}).get("status", "")

    def update(self, step: str, **changes: Any) -> None:
        """Change the record of a step and write both files."""
        records = self.read()
        records[step] = {**records.get(step, {}), **changes}
        write_file(self._file, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
        write_file(self.folder / "table.md", table(records))


def table(records: dict[str, dict[str, Any]]) -> str:
    """Markdown table: a row per figure, with the card, the versions and the command of its step."""
    lines = ["| step | figure | value | goal | card | versions | command |", "|---|---|--:|--:|---|---|---|"]
    for step, record in records.items():
        rows = list(record.get("figures", []))
        if record["status"] != "done":
            rows.append([record["status"], record.get("error", ""), ""])
        for figure, value, goal in rows:
            cells = (step, figure, _text(value), goal, record.get("card", ""), record.get("versions", ""))
            command = f"`{record['command']}`" if "command" in record else ""
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} | {command} |")
    return "\n".join(lines) + "\n"


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def measure(step: Step, options: argparse.Namespace) -> None:
    """Run a step in its process; write each figure when it is measured. The output is appended to OUTPUT/log.txt.

    Figures that a stopped step has measured on the same machine stay until they are measured again.
    """
    os.setpgrp()  # so that run_step can end all processes of the step
    threading.Thread(target=_end_with_the_call, daemon=True).start()
    with (options.output / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    results = Results(options.output)
    module, _, function = step.work.partition(":")
    work = getattr(importlib.import_module(module), function)
    machine, record = machine_of(options.device), results.read()[step.name]
    kept = record["figures"] if machine.items() <= record.items() else []
    figures: dict[str, tuple[str, float | str, str]] = {figure[0]: tuple(figure) for figure in kept}
    results.update(step.name, figures=list(figures.values()), **machine)
    for figure in work(options):
        print(*figure, flush=True)
        figures[figure[0]] = figure
        results.update(step.name, figures=list(figures.values()))


def machine_of(device: str) -> dict[str, str]:
    """Return the card and the versions for the record of a step."""
    from benchmarks.machine import hardware

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "numpy"))
    return {"card": hardware(device), "versions": f"Python {platform.python_version()}, {packages}"}


def _end_with_the_call() -> None:
    """Wait for the end of the call, also by SIGKILL; then end all processes of the step."""
    call = multiprocessing.parent_process()
    assert call is not None
    wait([call.sentinel])
    os.killpg(os.getpgrp(), signal.SIGKILL)


def run_step(step: Step, options: argparse.Namespace, seconds: float) -> None:
    """Run a step for at most `seconds` and record how it ended."""
    results, log = Results(options.output), options.output / "log.txt"
    earlier = results.read().get(step.name, {})
    if options.fresh or earlier.get("status") in FINISHED:
        earlier = {}
    before = earlier.get("seconds", 0.0)  # of calls that stopped the step
    limit = seconds if options.tiny else min(seconds, LIMIT * 60 * step.minutes - before)
    with log.open("a") as file:
        file.write(f"\n=== {step.name}\n")
    start, begin = log.stat().st_size, time.monotonic()
    data = "" if options.data is None else f"--data {shlex.quote(options.data_argument)} "
    results.update(
        step.name,
        status="running",
        error="",
        figures=earlier.get("figures", []),
        size=size_of(options),
        command=f"python -m benchmarks.gpu {size_of(options)}{data}--only {step.name}",
    )
    options.temporary.mkdir(exist_ok=True)
    process = multiprocessing.get_context("forkserver").Process(target=measure, args=(step, options))
    process.start()
    try:
        process.join(limit)
        code = process.exitcode
    finally:
        with contextlib.suppress(ProcessLookupError):  # the group does not exist (yet)
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        shutil.rmtree(options.temporary, ignore_errors=True)
    taken = time.monotonic() - begin
    if code is None and limit == seconds:
        ending = {"status": "stopped", "error": "the call's minutes ended; the next call runs the step again"}
    elif code is None:
        ending = {"status": "failed", "error": f"took {before + taken:.0f} s, {LIMIT} times its estimate"}
    elif code:
        text = log.read_bytes()[start:].decode(errors="replace")
        ending = {"status": "failed", "error": f"exit code {code}: {last_error(text)}"}
    else:
        ending = {"status": "done"}
    results.update(step.name, seconds=round(before + taken, 1), **ending)
    print(f"{step.name}: {ending['status']} in {taken:.0f} s  {ending.get('error', '')}", flush=True)


def last_error(text: str) -> str:
    """Return the last line of `text` that names an exception, else the last line that is not empty.

    The message of a CUDA error has several lines, of which the first one says what happened.
    """
    errors = [found.group() for found in ERROR.finditer(text)]
    return (errors or [line.strip() for line in text.splitlines() if line.strip()] or [""])[-1]


def size_of(options: argparse.Namespace) -> str:
    """Return the arguments that change what a step measures; "" for the measurement on a GPU."""
    return ("" if options.device == "cuda" else f"--device {options.device} ") + ("--tiny " if options.tiny else "")


def plan(steps: list[Step], results: Results) -> str:
    """Return the text of --plan: the steps in order, with estimate and status."""
    width = max(len(step.name) for step in steps)
    lines = [
        f"{s.name:<{width}}  {s.minutes:>4.1f} min  {results.status(s.name) or 'to run':<8}  {s.what}" for s in steps
    ]
    remaining = sum(step.minutes for step in steps if results.status(step.name) not in FINISHED)
    return "\n".join([*lines, f"remaining: {remaining:.1f} min on one H100 (estimates)"])


def parse(words: list[str] | None) -> argparse.Namespace:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help=f"folder with {', '.join(PACKS)} (with --tiny: generated)")
    parser.add_argument("--output", type=Path, help="default: build/gpu, with --tiny build/gpu-tiny")
    parser.add_argument(
        "--work", type=Path, default=Path("build/gpu-work"), help="training runs (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=minutes, default=9, help="length of the call (default: %(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="every step at a small size: a test of the command")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=names, help=", ".join(names))
    parser.add_argument(
        "--again", nargs="+", metavar="STEP", choices=names, default=[], help="run finished steps again"
    )
    parser.add_argument("--plan", action="store_true", help="print the steps with their estimates and stop")
    options = parser.parse_args(words)
    if not options.plan and options.data is None and not options.tiny:
        parser.error("argument --data: missing; expected the folder data that benchmarks/gpu_pack.sh makes")
    if not options.plan and options.data is not None:
        missing = [name for name in PACKS if not (options.data / name).is_file()]
        if missing:
            parser.error(
                f"argument --data: {options.data} has no {missing[0]}; benchmarks/gpu_pack.sh makes the folder"
            )
    if not options.plan and options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("argument --device: torch finds no CUDA device; run with --device cpu --tiny")
    options.data_argument = str(options.data)  # as given: the command in the table has no path of this machine
    options.output = options.output or Path("build/gpu-tiny" if options.tiny else "build/gpu")
    for name in ("data", "output", "work"):
        setattr(options, name, path.absolute() if (path := getattr(options, name)) else None)
    options.temporary = options.work / "temporary"
    check_output(parser, options)
    return options


def minutes(text: str) -> float:
    """Parse --minutes. Raises ArgumentTypeError unless it is a finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r}; expected minutes above 0")


def check_output(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error when a folder cannot be made, or holds results that this call could not continue."""
    file = options.output / "results.json"
    try:
        records = Results(options.output).read()
        for folder in () if options.plan else (options.output, options.work):
            folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        parser.error(f"{file}: is not a file of this command ({error}); choose another --output")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}; choose another folder")
    for step, record in records.items():
        if not options.plan and record.get("size", "") != size_of(options):
            measured = record.get("size", "").strip() or "--device cuda"
            parser.error(f"{file}: step {step} was measured with {measured}; choose another --output")


def main(words: list[str] | None = None) -> int:
    """Run the command line; return 1 if one of its steps has failed, in this call or an earlier one."""
    options = parse(words)
    results = Results(options.output)
    steps = [step for step in STEPS if not options.only or step.name in options.only]
    if options.plan:
        print(plan(steps, results))
        return 0
    deadline = time.monotonic() + 60 * options.minutes
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["benchmarks.gpu_speed", "benchmarks.gpu_encoders"]
    )
    print(f"`python -m benchmarks.gpu {shlex.join(words or sys.argv[1:])}`", flush=True)
    for step in steps:
        options.fresh = step.name in options.again
        if results.status(step.name) in FINISHED and not options.fresh:
            continue
        seconds = deadline - time.monotonic()
        needed = 0 if options.tiny else ENOUGH if step.resumes else step.minutes
        if seconds <= 60 * needed:
            print(f"{step.name}: left for the next call, {seconds / 60:.1f} minutes remain", flush=True)
        else:
            run_step(step, options, seconds)
    records = results.read()
    print(table(records))
    return int(any(results.status(step.name) == "failed" for step in steps))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a terminated call also ends its step
    sys.exit(main())
