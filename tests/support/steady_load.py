"""Continuous requests during version changes; checks that each response matches its version."""

from __future__ import annotations

import threading
import time
from typing import Protocol

import numpy as np
from conftest import TOP_K, Release, picture

from serving.client.sync_client import Client, Prediction
from serving.shared.errors import ServingError


class Addresses(Protocol):
    """An object with the URLs of a server."""

    @property
    def http_url(self) -> str: ...
    @property
    def grpc_url(self) -> str: ...


class Load:
    """Sends requests without pause over both protocols; records every response and every failure."""

    def __init__(self, server: Addresses) -> None:
        self.answers: list[tuple[int, Prediction]] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(url, seed))
            for seed, url in enumerate([server.http_url, server.grpc_url, server.http_url])
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def versions(self) -> list[int]:
        return [answer.version for _, answer in self.answers]

    def _ask(self, url: str, seed: int) -> None:
        with Client(url, timeout=20) as client:
            while not self._stop.is_set():
                try:
                    self.answers.append((seed, client.predict([picture(seed)], "balanced")[0]))
                except ServingError as error:
                    self.failures.append(str(error))
                time.sleep(0.02)


def assert_each_answer_is_its_versions(load: Load, exports: dict[int, Release]) -> None:
    assert load.failures == []
    expected_by_version: dict[tuple[int, int], np.ndarray] = {}
    for seed, answer in load.answers:
        if (seed, answer.version) not in expected_by_version:
            expected_by_version[seed, answer.version] = exports[answer.version].probabilities([picture(seed)], 0.0)[0]
        expected = np.sort(expected_by_version[seed, answer.version])[::-1][:TOP_K]
        np.testing.assert_allclose(answer.probabilities, expected, rtol=1e-4, atol=1e-6)
