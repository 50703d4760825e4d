"""The upper limit for a server: plain ONNX Runtime in a process, at its best setting.

It runs in a separate process, which computes only in its turns. Input: pixels, or JPEG files decoded as in the
classifier.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.serving_load import WARM_UP, LoadError, TurnResult
from benchmarks.serving_releases import Release
from models.preprocess import preprocess

# Seconds in which a session's threads may still spin after a run, on cores that the next side needs.
SPINNING = 1.0
PROVIDERS = {"cpu": "CPUExecutionProvider", "gpu": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Setting:
    """Number of parallel sessions, threads per session, images per run; decode: JPEG files instead of pixels."""

    sessions: int
    threads: int
    batch: int
    decode: bool = False

    def __str__(self) -> str:
        return f"{self.sessions} x {self.threads} threads, batch {self.batch}"


def candidate_settings(cores: int, batches: Sequence[int], decode: bool) -> list[Setting]:
    """Return the settings to try: one session on all cores, and one session per core."""
    divisions = sorted({(cores, 1), (1, cores)})
    return [Setting(*division, batch, decode) for division, batch in product(divisions, batches)]


class Raw:
    """The process that holds the sessions. A context manager."""

    def __init__(self, release: Release, device: str = "cpu") -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(target=_work, args=(child, release, device), daemon=True)
        self._process.start()
        child.close()

    def run(self, setting: Setting, seconds: float) -> TurnResult:
        """Measure one turn; latencies are of a batch, including decoding. Raises LoadError when the process exited."""
        try:
            self._connection.send((setting, seconds))
            result = TurnResult(*self._connection.recv())
        except (EOFError, OSError) as error:
            raise LoadError("raw ONNX Runtime has exited; see the output of its process above") from error
        if setting.threads > 1:
            time.sleep(SPINNING)
        return result

    def best(self, tried: Sequence[Setting], seconds: float) -> tuple[Setting, dict[str, float]]:
        """Return the fastest setting, and the images/s of all settings."""
        rates = {setting: self.run(setting, seconds).rate for setting in tried}
        return max(rates, key=lambda setting: rates[setting]), {str(setting): rate for setting, rate in rates.items()}

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(5)
        self._process.terminate()


def _work(connection: Connection, release: Release, device: str) -> None:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    sessions: dict[tuple[int, int], list[onnxruntime.InferenceSession]] = {}
    while True:
        try:
            setting, seconds = connection.recv()
        except EOFError:
            return
        key = (setting.sessions, setting.threads)
        if key not in sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = setting.threads
            providers = [PROVIDERS[device]]
            sessions[key] = [
                onnxruntime.InferenceSession(str(release.graph), options, providers=providers)
                for _ in range(setting.sessions)
            ]
        connection.send(_turn(sessions[key], release, setting, seconds))


def _turn(sessions: list, release: Release, setting: Setting, seconds: float) -> tuple[float, np.ndarray, float]:
    """Return images/s, milliseconds of each run, and 0 (no load generator)."""
    begins = time.perf_counter() + WARM_UP * seconds
    rates, latencies = [0.0] * len(sessions), [[] for _ in sessions]

    def loop(number: int) -> None:
        runs, started, last = 0, 0.0, 0.0
        while not latencies[number] or last < begins + seconds:
            begin = time.perf_counter()
            _infer(sessions[number], release, setting, runs * setting.batch)
            last = time.perf_counter()
            if begin >= begins:
                started = started or begin
                latencies[number].append((last - begin) * 1000)
            runs += 1
        rates[number] = len(latencies[number]) * setting.batch / max(last - started, 1e-6)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(len(sessions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates), np.concatenate([np.array(each) for each in latencies]), 0.0


def _infer(session: Any, release: Release, setting: Setting, start: int) -> None:
    indices = [(start + offset) % len(release.pixels) for offset in range(setting.batch)]
    if setting.decode:
        size = release.network.size
        images = np.stack([preprocess(release.photos[index], size, size) for index in indices])
    else:
        images = release.pixels[indices]
    strength = np.zeros((setting.batch, 1), dtype=np.float32)
    session.run(["logits"], {"image": images, "strength": strength})
