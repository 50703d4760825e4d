"""L_GML + L_tau, forward and backward, against the one-hot form: `python -m benchmarks.gml_loss [--device cuda]`.

Four forms of the same two losses, float32, from a given similarity [B,K] to its gradient and that of log tau_g:
- one-hot: as the official code has it. Each loss builds the one-hot [K,C] of the keys' classes and multiplies it twice,
  with the exponentials and with the weights (1 or 0) that count the keys.
- lean one-hot: the same, but the one-hot is built once a step and nothing is multiplied only to be counted.
- gml_loss twice: models.losses, the reference (scatter and index_add over the classes).
- contrast_losses: models.contrast_losses, what training uses; on CUDA also with its fused kernels.

Before anything is timed, every form's losses and gradients are held against the one-hot form's. Time is the median over
rounds in which the forms take turns. Peak memory is what one step adds to its inputs: on CUDA max_memory_allocated, on
the CPU the growth of the peak resident set (VmHWM) in a fresh process for each figure.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.contrast_losses import KeyRuns, contrast_losses
from models.losses import gml_loss, other_sample_mask
from models.queues import queue_lengths

SIZES = [(128, 4096, 100), (128, 16384, 1000), (128, 65536, 8142)]
TIME_GOALS = {"cuda": [5, 8, 20], "cpu": [None, 3, None]}
MEMORY_GOALS = [None, None, 10]
ONE_HOT = "one-hot"


class Case(NamedTuple):
    """similarity [B,K] and log_tau [] are leaves that collect gradients; see contrast_losses for the rest."""

    similarity: Tensor
    log_tau: Tensor
    runs: KeyRuns
    target: Tensor
    log_prior: Tensor
    query_ids: Tensor
    key_ids: Tensor


def make_case(batch: int, keys: int, classes: int, device: str) -> Case:
    """A memory as ImageNet-LT's would be (1280 to 5 images a class, k_m 2), every query's own image in it once."""
    generator = torch.Generator().manual_seed(0)
    counts = [int(1280 * (5 / 1280) ** (c / (classes - 1))) for c in range(classes)]
    lengths = torch.tensor(queue_lengths(counts, keys, 2))
    row_class = torch.repeat_interleave(torch.arange(classes), lengths)
    own = torch.randperm(keys, generator=generator)[:batch]
    key_ids = -torch.arange(1, keys + 1)
    key_ids[own] = torch.arange(batch)
    features = F.normalize(torch.randn(batch + keys, 32, generator=generator), dim=1)
    log_prior = (torch.tensor(counts) / sum(counts)).log()
    starts = lengths.cumsum(0) - lengths
    runs = KeyRuns(row_class.to(device), starts.to(device), lengths.to(device), int(lengths.max()))
    return Case(
        (features[:batch] @ features[batch:].T).to(device).requires_grad_(),
        torch.tensor(0.1, device=device).log().requires_grad_(),
        runs,
        row_class[own].to(device),
        log_prior.to(device),
        torch.arange(batch, device=device),
        key_ids.to(device),
    )


def one_hot_loss(case: Case, similarity: Tensor, tau: Tensor, weights: Tensor) -> Tensor:
    """One loss; weights: [B,K], 1 keeps a pair."""
    exponent = similarity / tau
    peak = exponent.amax(1, keepdim=True).detach()
    one_hot = F.one_hot(case.runs.row_class, len(case.log_prior)).to(similarity.dtype)
    mean = ((exponent - peak).exp() * weights) @ one_hot / (weights @ one_hot)
    return F.cross_entropy(mean.log() + peak + case.log_prior, case.target)


def one_hot(case: Case) -> tuple[Tensor, Tensor]:
    weights = (case.query_ids[:, None] != case.key_ids[None, :]).to(case.similarity.dtype)
    tau = case.log_tau.exp()
    gml = one_hot_loss(case, case.similarity, tau.detach(), torch.ones_like(weights))
    return gml, one_hot_loss(case, case.similarity.detach(), tau, weights)


def lean_one_hot(case: Case) -> tuple[Tensor, Tensor]:
    one_hot = F.one_hot(case.runs.row_class, len(case.log_prior)).float()
    own = case.query_ids[:, None] == case.key_ids[None, :]
    counts = case.runs.lengths.float().expand(len(case.target), -1)
    other_counts = counts.scatter_add(1, case.target[:, None], -own.sum(1, keepdim=True).float())

    def loss(exponent: Tensor, counts: Tensor, left_out: Tensor | None) -> Tensor:
        peak = exponent.amax(1, keepdim=True).detach()
        mass = (exponent - peak).exp()
        mass = mass if left_out is None else mass.masked_fill(left_out, 0.0)
        return F.cross_entropy((mass @ one_hot / counts).log() + peak + case.log_prior, case.target)

    tau = case.log_tau.exp()
    return loss(case.similarity / tau.detach(), counts, None), loss(case.similarity.detach() / tau, other_counts, own)


def reference(case: Case) -> tuple[Tensor, Tensor]:
    tau, mask = case.log_tau.exp(), other_sample_mask(case.query_ids, case.key_ids)
    classes = case.runs.row_class
    gml = gml_loss(case.similarity, classes, case.target, case.log_prior, tau.detach())
    return gml, gml_loss(case.similarity.detach(), classes, case.target, case.log_prior, tau, mask=mask)


def ours(case: Case, fused: bool = False) -> tuple[Tensor, Tensor]:
    losses = contrast_losses(
        case.similarity, case.runs, case.target, case.log_prior, case.log_tau.exp(),
        query_ids=case.query_ids, key_ids=case.key_ids, fused=fused,
    )  # fmt: skip
    return losses.gml, losses.tau


Form = Callable[[Case], tuple[Tensor, Tensor]]
FORMS: dict[str, Form] = {
    ONE_HOT: one_hot,
    "lean one-hot": lean_one_hot,
    "gml_loss twice": reference,
    "contrast_losses": ours,
    "contrast_losses, fused": functools.partial(ours, fused=True),
}


def forms_on(device: str) -> list[str]:
    return list(FORMS) if device == "cuda" else [name for name in FORMS if "fused" not in name]


def step(form: Form, case: Case) -> tuple[Tensor, Tensor]:
    case.similarity.grad = case.log_tau.grad = None
    gml, tau = form(case)
    (gml + tau).backward()
    return gml.detach(), tau.detach()


def check(form: Form, case: Case, expected: list[Tensor]) -> None:
    """Raises AssertionError when a loss or gradient is off by more than float32 sums in another order explain."""
    found = [*step(form, case), case.similarity.grad, case.log_tau.grad]
    for name, a, b in zip(["L_GML", "L_tau", "d/dsimilarity", "d/dlog tau"], found, expected, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        if not error < 1e-4:
            raise AssertionError(f"{name} is off by {error:.1e} of its largest value")


def milliseconds(form: Form, case: Case) -> float:
    if case.similarity.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step(form, case)
    if case.similarity.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def times(case: Case, names: list[str], repeat: int) -> dict[str, float]:
    """Median milliseconds of a step by form, after the check, which warms up as well."""
    expected = [*step(one_hot, case), case.similarity.grad.clone(), case.log_tau.grad.clone()]
    for name in names:
        check(FORMS[name], case, expected)
    del expected
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeat):
        for name in names:
            taken[name].append(milliseconds(FORMS[name], case))
    return {name: statistics.median(values) for name, values in taken.items()}


def status_mebibytes(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_here(name: str, size: tuple[int, int, int], device: str) -> float:
    """MiB that one step adds at its peak to what it starts from."""
    step(FORMS[name], make_case(4, 64, 8, device))  # libraries and threads take their memory now
    case = make_case(*size, device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(FORMS[name], case)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = status_mebibytes("VmRSS")
    step(FORMS[name], case)
    return status_mebibytes("VmHWM") - before


def peak(name: str, size: tuple[int, int, int], device: str) -> float:
    """peak_here in a process of its own, so that neither caches nor the heap of an earlier form count."""
    command = [sys.executable, "-m", "benchmarks.gml_loss", "--device", device, "--peak", name, *map(str, size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def head(device: str, repeat: int) -> str:
    hardware = torch.cuda.get_device_name() if device == "cuda" else processor()
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"`python -m benchmarks.gml_loss --device {device} --repeat {repeat}`\n\n"
        f"{hardware}; torch {torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}; "
        f"load average at the start {load}.\nL_GML + L_tau, forward and backward, float32; median of {repeat}. "
        f"Ratios are one-hot / this form.\n"
    )


def processor() -> str:
    """The CPU's name and how many cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description="L_GML + L_tau against the one-hot form: time and peak memory.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeat", type=int, help="timed rounds (default: 5 on the CPU, 50 on CUDA)")
    parser.add_argument("--peak", nargs=4, metavar=("FORM", "B", "K", "C"), help="print the MiB of one form and stop")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device here; run with --device cpu")
    if arguments.peak:
        name, *size = arguments.peak
        print(peak_here(name, tuple(map(int, size)), device))
        return
    repeat = arguments.repeat or (50 if device == "cuda" else 5)
    print(head(device, repeat))
    print("| B, K, C | form | time ms | time ratio | goal | peak MiB | memory ratio | goal |")
    print("|---|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for size, time_goal, memory_goal in zip(SIZES, TIME_GOALS[device], MEMORY_GOALS, strict=True):
        names = forms_on(device)
        taken = times(make_case(*size, device), names, repeat)
        peaks = {name: peak(name, size, device) for name in names}
        for name in names:
            goals = [f"≥ {goal}" if goal and name.startswith("contrast") else "" for goal in (time_goal, memory_goal)]
            print(
                f"| {', '.join(map(str, size))} | {name} | {taken[name]:.2f} | {taken[ONE_HOT] / taken[name]:.1f} | {goals[0]} "
                f"| {peaks[name]:.0f} | {peaks[ONE_HOT] / peaks[name]:.1f} | {goals[1]} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
