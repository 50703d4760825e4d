"""Run the container's entry point without a container, on a Triton with selectable backends.

TAILOR_TEST_BACKENDS: a folder with Triton's backend `onnxruntime`; then `student` runs in that backend, from the same
config.pbtxt as in a container. Without it the local server's Python replacement is used.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from serving.server.installation import find_installation
from serving.shared.ports import choose_ports

DEPLOY = Path(__file__).parents[2] / "serving" / "deploy"
BACKENDS_VARIABLE = "TAILOR_TEST_BACKENDS"
READY = 120.0  # seconds


@dataclass(frozen=True)
class Container:
    """URLs of a server started by the container's entry point."""

    http_url: str
    grpc_url: str
    metrics_url: str


class EndedWhileStarting(Exception):
    """The server exited before it was healthy; the message is its log."""


def backends() -> Path | None:
    """Return the folder with Triton's onnxruntime backend; None where TAILOR_TEST_BACKENDS is not set."""
    backends = os.environ.get(BACKENDS_VARIABLE)
    return Path(backends).absolute() if backends else None


@contextmanager
def running_container(repository: Path, folder: Path, key: str) -> Iterator[Container]:
    """Context manager: run the entry point on a repository. folder: an empty folder for links and the log.

    Raises EndedWhileStarting.
    """
    (folder / "models").symlink_to(repository)  # Triton does not support a space in a path
    installation = find_installation()
    python = folder / "backends" / "python"
    python.mkdir(parents=True)
    for name, path in installation.backend_files.items():
        (python / name).symlink_to(path)
    options = [f"--backend-directory={folder / 'backends'}"]
    if others := backends():
        (folder / "backends" / "onnxruntime").symlink_to(others / "onnxruntime")
    else:
        options.append("--model-config-name=local")
    ports = choose_ports("127.0.0.1", {"--http-port": 0, "--grpc-port": 0, "--metrics-port": 0})
    options += [f"{option}={port}" for option, port in ports.items()]
    environment = installation.environment | {
        # PATH also selects the Python of the inference processes, so the environment's bin folder comes first.
        "PATH": os.pathsep.join(
            [str(Path(sys.executable).parent), str(installation.server.parent), installation.environment["PATH"]]
        ),
        "TAILOR_REPOSITORY": str(folder / "models"),
        "TAILOR_HOST": "127.0.0.1",
        "TAILOR_ADMIN_KEY": key,
    }
    http, grpc, metrics = (f"127.0.0.1:{ports[name]}" for name in ("--http-port", "--grpc-port", "--metrics-port"))
    with (folder / "triton.log").open("wb") as log:
        process = subprocess.Popen(
            [DEPLOY / "entrypoint.sh", *options], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        await_health(f"http://{http}", process, folder / "triton.log", folder / "models")
        yield Container(f"http://{http}", f"grpc://{grpc}", f"http://{metrics}/metrics")
    finally:
        process.terminate()
        process.wait(timeout=30)


def await_health(url: str, process: subprocess.Popen[bytes], log: Path, repository: Path) -> None:
    """Run the image's HEALTHCHECK until it succeeds; fail with the server's log after READY seconds."""
    deadline = time.monotonic() + READY
    while True:
        command = [sys.executable, DEPLOY / "healthcheck.py", url]
        environment = os.environ | {"TAILOR_REPOSITORY": str(repository)}
        if subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0:
            return
        if process.poll() is not None:
            raise EndedWhileStarting(log.read_text())
        assert time.monotonic() < deadline, log.read_text()


def metrics_text(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())
