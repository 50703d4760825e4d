"""What a benchmark ran on, in a line."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import torchvision


def hardware(device: str) -> str:
    """The GPU's name, where it is one, and the processor's."""
    return f"{torch.cuda.get_device_name()}, {processor()}" if device == "cuda" else processor()


def processor() -> str:
    """The processor's name and how many cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def versions(threads: int) -> str:
    """Versions, torch's threads, and how busy the machine is by other work."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {threads} threads, Python "
        f"{platform.python_version()}; load average at the start {load}"
    )
