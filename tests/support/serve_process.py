"""`tailor serve` in a separate process, and its processes and shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

ANY_PORT = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


def shared_memory(prefix: str) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]


def family(process_id: int) -> list[psutil.Process]:
    return psutil.Process(process_id).children(recursive=True)


def of_run(process_id: int) -> list[str]:
    """Return the names of a server process's shared-memory files."""
    return [path.name for path in Path("/dev/shm").glob(f"tailor_*_{process_id}_*")]


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != "zombie"]


def triton_of(serving: subprocess.Popen[str]) -> psutil.Process:
    return next(process for process in family(serving.pid) if process.name() == "tritonserver")


def started_serve(repository: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `tailor serve` in a separate process."""
    command = [sys.executable, "-m", "serving.commands", "serve", "--repository", str(repository), *ANY_PORT]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*command, "--quiet", "--log", str(tmp_path / "triton.log")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()
