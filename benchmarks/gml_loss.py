"""Time and memory of L_GML + L_tau against the one-hot form: `python -m benchmarks.gml_loss [--device cuda]`.

Four forms of the same two losses, forward and backward in float32, from a given similarity [B,K] to its gradient and
that of log tau_g:
- one-hot: as in the official code. Each loss builds the one-hot matrix [K,C] of the keys' classes and multiplies it
  twice, with the exponentials and with the weights (1 or 0) that count the keys.
- lean one-hot: the same, but the one-hot matrix is built once per step and counting needs no multiplication.
- gml_loss twice: the reference in models.contrast.gml_reference (scatter and index_add over the classes).
- contrast_losses: models.contrast.gml, used in training; on CUDA also with the fused kernels.

Before the timing, the losses and gradients of every form are compared with the one-hot form. On CUDA the kernels are
also compared with the plain version, each timed alone as a replayed CUDA graph; the report names the faster one. Time
is the median over rounds in which the forms take turns, with the spread. Peak memory is what one step adds to its
inputs: on CUDA max_memory_allocated, on the CPU the growth of the peak resident set (VmHWM) in a new process per
figure.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gml_forms import FORMS, FUSED, ONE_HOT, OURS, Case, Form, check, make_case, step
from benchmarks.machine import add_device_option, gpu_note, hardware, versions
from benchmarks.other_work import OtherWork, memory_mebibytes, quiet_ratio
from models.contrast.fused_kernel import FusedOwnClassLogSumExp
from models.contrast.fused_kernel_check import device_milliseconds, kernel_fault, random_inputs
from models.contrast.gml import OwnClassLogSumExp
from serving.shared.atomic import write_file

SIZES = [(128, 4096, 100), (128, 16384, 1000), (128, 65536, 8142)]
TIME_GOALS = {"cuda": [5, 8, 20], "cpu": [None, 3, None]}
MEMORY_GOALS = [None, None, 10]
HEADING = (
    "| B, K, C | form | time ms | spread | time ratio | goal | peak MiB | memory ratio | goal |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|"
)


def usable_forms(case: Case) -> list[str]:
    """Return the names of the forms that run on the case's device. The fused kernels run on CUDA only, if correct."""
    (batch, keys), device = case.similarity.shape, case.similarity.device
    fused = device.type == "cuda" and not kernel_fault(
        device, batch, keys, case.runs.longest, OwnClassLogSumExp, timed=False
    )
    return [name for name in FORMS if fused or name != FUSED]


def milliseconds(form: Form, case: Case) -> float:
    if case.similarity.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step(form, case)
    if case.similarity.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def times(case: Case, names: list[str], repeat: int) -> dict[str, list[float]]:
    """Return the milliseconds of a step by form and round, measured after the check, which is also the warm-up."""
    expected = [*step(FORMS[ONE_HOT], case), case.similarity.grad.clone(), case.log_tau.grad.clone()]
    for name in names:
        check(FORMS[name], case, expected)
    del expected
    milliseconds_of: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeat):
        for name in names:
            milliseconds_of[name].append(milliseconds(FORMS[name], case))
    return milliseconds_of


def peak_here(name: str, size: tuple[int, int, int], device: str) -> float:
    """Return the peak MiB that one step adds to the memory in use before it."""
    step(FORMS[name], make_case(4, 64, 8, device))  # warm-up: libraries and threads allocate their memory
    case = make_case(*size, device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(FORMS[name], case)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = memory_mebibytes("VmRSS")
    step(FORMS[name], case)
    return memory_mebibytes("VmHWM") - before


def peak(name: str, size: tuple[int, int, int], device: str) -> float:
    """Run peak_here in a separate process, so that caches and the heap of an earlier form do not count."""
    command = [sys.executable, "-m", "benchmarks.gml_loss", "--device", device, "--peak", name, *map(str, size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def kernels_against_plain(size: tuple[int, int, int]) -> str:
    """Compare the fused kernels with the plain version at a size: deviation, and which of the two is faster."""
    case, size_text = make_case(*size, "cuda"), ", ".join(map(str, size))
    longest = case.runs.longest
    if fault := kernel_fault(case.similarity.device, *size[:2], longest, OwnClassLogSumExp, timed=False):
        return f"{size_text}: the kernels differ from the plain version: {fault}"
    plain = [*step(FORMS[OURS], case), case.similarity.grad.clone(), case.log_tau.grad.clone()]
    fused = [*step(FORMS[FUSED], case), case.similarity.grad, case.log_tau.grad]
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(fused, plain, strict=True))
    inputs = random_inputs(case.similarity.device, *size[:2], longest)
    fused_ms, plain_ms = (device_milliseconds(split, inputs) for split in (FusedOwnClassLogSumExp, OwnClassLogSumExp))
    verdict = f"faster by {plain_ms / fused_ms:.2f}" if fused_ms < plain_ms else f"slower by {fused_ms / plain_ms:.2f}"
    return (
        f"{size_text}: losses and gradients of the kernels differ by at most {error:.1e} of the plain version's largest value; "
        f"as a graph, {fused_ms:.4f} ms against {plain_ms:.4f}: the kernels are {verdict}"
    )


def rows(
    size: tuple[int, int, int], device: str, repeat: int, goals: tuple[float | None, float | None]
) -> Iterator[str]:
    """Yield the table's rows of one size. goals: for the time ratio and the memory ratio."""
    case = make_case(*size, device)
    names = usable_forms(case)
    others = OtherWork()
    milliseconds_of = times(case, names, repeat)
    share = others.share()
    del case
    medians = {name: statistics.median(values) for name, values in milliseconds_of.items()}
    peaks = {name: peak(name, size, device) for name in names}
    for name, values in milliseconds_of.items():
        time_goal, memory_goal = (f"≥ {goal}" if goal and name in (OURS, FUSED) else "" for goal in goals)
        yield (
            f"| {', '.join(map(str, size))} | {name} | {medians[name]:.2f} | {min(values):.2f} to {max(values):.2f} "
            f"| {quiet_ratio(f'{medians[ONE_HOT] / medians[name]:.1f}', share)} | {time_goal} "
            f"| {peaks[name]:.0f} | {peaks[ONE_HOT] / peaks[name]:.1f} | {memory_goal} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="L_GML + L_tau against the one-hot form: time and peak memory.")
    add_device_option(parser)
    parser.add_argument("--repeat", type=int, help="timed rounds (default: 5 on the CPU, 50 on CUDA)")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    parser.add_argument("--peak", nargs=4, metavar=("FORM", "B", "K", "C"), help="print the MiB of one form and stop")
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.peak:
        name, *size = arguments.peak
        print(peak_here(name, tuple(map(int, size)), device))
        return
    repeat = arguments.repeat or (50 if device == "cuda" else 5)
    lines: list[str] = []

    def add_line(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    add_line(
        f"`python -m benchmarks.gml_loss --device {device} --repeat {repeat}`\n\n"
        f"{hardware(device)}; {versions(torch.get_num_threads())}.\n"
        f"L_GML + L_tau, forward and backward, float32; median of {repeat}. Ratios are one-hot / this form.\n"
    )
    add_line(HEADING)
    for size, *goals in zip(SIZES, TIME_GOALS[device], MEMORY_GOALS, strict=True):
        for row in rows(size, device, repeat, tuple(goals)):
            add_line(row)
    if device == "cuda":
        add_line("")
        for size in SIZES:
            add_line(f"- {kernels_against_plain(size)}")
    else:
        add_line(gpu_note("python -m benchmarks.gml_loss --device cuda --output benchmarks/results/gml_loss-cuda.md"))
    if arguments.output:
        write_file(arguments.output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
