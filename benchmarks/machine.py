"""One-line descriptions of the machine of a training benchmark: hardware, versions, load."""

from __future__ import annotations

import argparse
import platform

import torch
import torchvision

from benchmarks.other_work import load_average, processor


def hardware(device: str) -> str:
    """Return the name of the CPU, preceded by that of the GPU for device `cuda`."""
    return f"{torch.cuda.get_device_name()}, {processor()}" if device == "cuda" else processor()


def versions(threads: int) -> str:
    """Return versions, torch's number of threads, and the load average."""
    return (
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {threads} threads, Python "
        f"{platform.python_version()}; load average at the start {load_average()}"
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add --device; a device `cuda` that torch does not find is an error of the command line."""

    def device(name: str) -> str:
        if name == "cuda" and not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("torch finds no CUDA device; run with --device cpu")
        return name

    parser.add_argument("--device", type=device, choices=["cpu", "cuda"], default="cpu")


def gpu_note(command: str) -> str:
    """Return the note of a CPU report that names the command for a GPU."""
    return f"\nThis report covers the CPU only. On a GPU, run `{command}`.\n"
