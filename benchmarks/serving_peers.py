"""The peer servers of benchmarks.serving: start each in the peers' environment, build its requests, stop it.

While another side is measured, a peer's processes are suspended (SIGSTOP), since some use CPU while idle.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks.serving_load import Load, LoadError, http_request, run
from benchmarks.serving_releases import Release
from serving.shared.ports import choose_ports

FOLDER = Path(__file__).with_name("peers")
REQUIREMENTS = Path(__file__).with_name("peers-requirements.txt")
START_SECONDS = 120.0
END_SECONDS = 5.0
BOUNDARY = "benchmark-of-tailor"
NO_TELEMETRY = {"BENTOML_DO_NOT_TRACK": "true", "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Peer:
    """A server to compare with. request: builds its HTTP request from one image's pixels, uint8 [3,S,S]."""

    name: str
    package: str
    script: str
    request: Callable[[np.ndarray], bytes]


def raw(pixels: np.ndarray) -> bytes:
    return http_request("/predict", pixels.tobytes(), {"content-type": "application/octet-stream"})


def multipart(name: str, filename: str, kind: str, content: bytes) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"'
    head = f"--{BOUNDARY}\r\n{disposition}\r\nContent-Type: {kind}\r\n\r\n".encode()
    body = head + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    return http_request("/predict", body, {"content-type": f"multipart/form-data; boundary={BOUNDARY}"})


def bytes_field(pixels: np.ndarray) -> bytes:
    return multipart("image", "image.bin", "application/octet-stream", pixels.tobytes())


def bitmap_field(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(stream, "BMP")
    return multipart("images", "image.bmp", "image/bmp", stream.getvalue())


PEERS = {
    "litserve": Peer("LitServe", "litserve", "litserve_server.py", bytes_field),
    "bentoml": Peer("BentoML", "bentoml", "bentoml_server.py", bitmap_field),
    "ray": Peer("Ray Serve", "ray", "ray_server.py", raw),
    "fastapi": Peer("FastAPI", "fastapi", "fastapi_server.py", raw),
}


def version_of(peer: Peer, python: Path) -> str | None:
    """Return the peer's version in an environment; None where it is not installed."""
    program = f"from importlib.metadata import version; print(version({peer.package!r}))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def how_to_install(python: Path | None = None) -> str:
    """Return the command that installs the peers."""
    venv = python.parent.parent if python else Path("build/peers")
    return (
        f"python3 -m venv {venv} && {venv}/bin/pip install -r benchmarks/{REQUIREMENTS.name}, then --peers-python "
        f"{venv}/bin/python"
    )


@dataclass
class RunningPeer:
    """A running peer and the load for it."""

    load: Load
    process: psutil.Process

    def pause(self) -> None:
        for process in self._all():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        for process in reversed(self._all()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def end(self) -> None:
        """Terminate the peer; kill processes that remain after END_SECONDS."""
        self.resume()
        processes = self._all()
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.terminate()
        _, remaining = psutil.wait_procs(processes, END_SECONDS)
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(remaining, END_SECONDS)

    def _all(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.process, *self.process.children(recursive=True)]
        return []


@contextlib.contextmanager
def serving(peer: Peer, python: Path, release: Release, users: int, log: Path) -> Iterator[RunningPeer]:
    """Run a peer on all cores; yields it after its first response. Raises LoadError without one. Output: `log`."""
    cores = len(os.sched_getaffinity(0))
    port = choose_ports("127.0.0.1", {"--port": 0})["--port"]
    settings = {"BENCHMARK_GRAPH": str(release.graph), "BENCHMARK_PORT": str(port), "BENCHMARK_WORKERS": str(cores)}
    environment = {**os.environ, **NO_TELEMETRY, **settings, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    environment.pop("VIRTUAL_ENV", None)
    load = Load(port, [peer.request(pixels) for pixels in release.pixels], users=users)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, FOLDER / peer.script], cwd=FOLDER, env=environment,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    running = RunningPeer(load, psutil.Process(process.pid))
    try:
        _wait_for_response(process, running, peer, log)
        yield running
    finally:
        running.end()
        process.wait()


def _wait_for_response(process: subprocess.Popen[bytes], running: RunningPeer, peer: Peer, log: Path) -> None:
    deadline, once = time.monotonic() + START_SECONDS, Load(running.load.port, running.load.requests, users=1)
    while True:
        try:
            run(once, 1.0)
            return
        except (LoadError, OSError) as error:
            if process.poll() is not None:
                raise LoadError(
                    f"{peer.name} exited with status {process.returncode} during its start; see {log}"
                ) from error
            if time.monotonic() > deadline:
                raise LoadError(
                    f"{peer.name} did not respond within {START_SECONDS:g} s: {error}; see {log}"
                ) from error
            time.sleep(0.3)
