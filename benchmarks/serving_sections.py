"""The sections of benchmarks.serving: the servers that each starts, the sides that take turns, the stored result."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import serving_load
from benchmarks.other_work import MOST
from benchmarks.serving_grpc import GrpcWire, grpc_request
from benchmarks.serving_load import Load, http_request
from benchmarks.serving_peers import PEERS, serving, version_of
from benchmarks.serving_raw import Raw, candidate_settings
from benchmarks.serving_releases import NETWORKS, TRIAL, Release, release_of
from benchmarks.serving_turns import Side, in_rounds, median
from serving.client import Client
from serving.repository.model_config import Device
from serving.server.triton_server import TritonServer
from serving.transport.connection import Connection
from serving.transport.messages import Infer

LARGE, LARGE_USERS = 8, 8  # images in a large request, and concurrent large requests
SEARCH = 0.5  # time of each setting in the search, as a fraction of a turn


@dataclass(frozen=True)
class Settings:
    """Options of all sections. others: largest share of the cores used by other work for which a ratio is printed."""

    work: Path
    seconds: float
    rounds: int
    device: Device
    peers_python: Path | None
    others: float = MOST


@dataclass(frozen=True)
class Section:
    """A measurement whose result is stored. kind: the kind of comparison. peer: a key of PEERS for the kind `peer`."""

    kind: str
    network: str
    peer: str | None = None

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.kind, self.peer, self.network) if part)

    def measure(self, settings: Settings) -> dict[str, Any]:
        release = release_of(self.network, settings.work, settings.device)
        return MEASURES[self.kind](self, settings, release)


def sections() -> list[Section]:
    """Return all sections, those of the trial network last."""
    every = []
    for network in NETWORKS:
        every.append(Section("limit", network))
        if network in ("resnet32", TRIAL):  # a larger network would hide the cost of an adjustment
            every.append(Section("adjustment", network))
        if network in ("resnet32", "resnet50", TRIAL):
            every += [Section("peer", network, peer) for peer in PEERS]
    return sorted(every, key=lambda section: section.network == TRIAL)


def measure_limit(section: Section, settings: Settings, release: Release) -> dict[str, Any]:
    """Measure raw ONNX Runtime against `student`, and decoding with inference against `classifier`."""
    cores, seconds = len(os.sched_getaffinity(0)), settings.seconds * release.network.stretch
    with Raw(release, settings.device) as raw, serve_release(release, settings) as server:
        best, tried = raw.best(candidate_settings(cores, release.network.batches, False), SEARCH * seconds)
        best_decoding, tried_decoding = raw.best(
            candidate_settings(cores, release.network.batches, True), SEARCH * seconds
        )
        sides: dict[str, Side] = {
            "raw": functools.partial(raw.run, best),
            "HTTP, batch 1": student_side(server, release),
            "HTTP, batch 8": student_side(server, release, LARGE),
            "gRPC, batch 1": student_side(server, release, grpc=True),
            "decode and infer": functools.partial(raw.run, best_decoding),
            "classifier": classifier_side(server, release, ["balanced"]),
        }
        if section.network.startswith("resnet50"):  # a batch of eight adds no information where one image is slow
            del sides["HTTP, batch 8"]
        turns = in_rounds(section.name, sides, settings.rounds, seconds)
    limits = {
        "raw": {"best": str(best), "tried": tried},
        "decode and infer": {"best": str(best_decoding), "tried": tried_decoding},
    }
    return {"limits": limits, "turns": turns}


def measure_adjustment(section: Section, settings: Settings, release: Release) -> dict[str, Any]:
    """Measure the cost of a request's prior."""
    uniform = np.full(10, 0.1)
    with serve_release(release, settings) as server:
        sides = {
            "student, strength 0": student_side(server, release),
            "student, strength 1": student_side(server, release, strength=1.0),
            "classifier, balanced": classifier_side(server, release, ["balanced"]),
            "classifier, train": classifier_side(server, release, ["train"]),
            "classifier, mixed strengths": classifier_side(server, release, ["balanced", "train", 0.5, -1.0]),
            "classifier, a third with a prior of its own": classifier_side(
                server, release, ["balanced", "train", uniform]
            ),
        }
        return {"turns": in_rounds(section.name, sides, settings.rounds, settings.seconds)}


def measure_peer(section: Section, settings: Settings, release: Release) -> dict[str, Any]:
    """Measure a peer against `student` over HTTP, batch 1: at saturation, then both at half the peer's rate."""
    peer, python = PEERS[section.peer or ""], settings.peers_python
    if python is None or (version := version_of(peer, python)) is None:
        return {}
    users, seconds = release.network.users, settings.seconds * release.network.stretch
    log = settings.work.absolute() / f"{section.name}.log"
    with serve_release(release, settings) as server, serving(peer, python, release, users, log) as running:

        def peer_side(load: Load, seconds: float) -> serving_load.TurnResult:
            running.resume()
            try:
                return serving_load.run(load, seconds)
            finally:
                running.pause()

        running.pause()
        ours = student_load(server, release)
        sides = {"Tailor": load_side(ours), "peer": functools.partial(peer_side, running.load)}
        full = in_rounds(section.name, sides, settings.rounds, seconds)
        rate = median(full["peer"], "rate") / 2
        paced = {
            "Tailor": load_side(Load(ours.port, ours.requests, 1, users, rate)),
            "peer": functools.partial(peer_side, Load(running.load.port, running.load.requests, 1, users, rate)),
        }
        half = in_rounds(f"{section.name} at half load", paced, settings.rounds, seconds)
    return {"version": version, "turns": full, "half": half, "half_rate": rate}


MEASURES: dict[str, Callable[[Section, Settings, Release], dict[str, Any]]] = {
    "limit": measure_limit,
    "adjustment": measure_adjustment,
    "peer": measure_peer,
}


@contextmanager
def serve_release(release: Release, settings: Settings) -> Iterator[TritonServer]:
    """Serve a release as `tailor serve` does, on free ports."""
    log = settings.work.absolute() / "triton.log"
    with TritonServer(release.repository, http_port=0, grpc_port=0, metrics_port=0, log=log) as server:
        yield server


def load_side(load: Load) -> Side:
    return functools.partial(serving_load.run, load)


def student_side(
    server: TritonServer, release: Release, batch: int = 1, strength: float = 0.0, grpc: bool = False
) -> Side:
    return load_side(student_load(server, release, batch, strength, grpc))


def student_load(
    server: TritonServer, release: Release, batch: int = 1, strength: float = 0.0, grpc: bool = False
) -> Load:
    """Return a load on `student` that requests logits."""
    calls = []
    for start in range(0, len(release.pixels), batch):
        strengths = np.full((batch, 1), strength, dtype=np.float32)
        inputs = {"image": release.pixels[start : start + batch], "strength": strengths}
        calls.append(Infer("student", inputs, {"logits": 0}))
    users = release.network.users if batch == 1 else LARGE_USERS
    if grpc:
        return Load(port_of(server.grpc_url), [grpc_request(call) for call in calls], batch, users, wire=GrpcWire)
    return Load(port_of(server.http_url), [as_http(call) for call in calls], batch, users)


def classifier_side(server: TritonServer, release: Release, priors: list[Any]) -> Side:
    """Return a load on `classifier` over HTTP: one JPEG file per request, under the priors in turn."""
    with Client(server.http_url) as client:
        pairs = itertools.islice(zip(itertools.cycle(release.photos), itertools.cycle(priors), strict=False), 96)
        requests = [as_http(client.request([photo], prior)) for photo, prior in pairs]
    return load_side(Load(port_of(server.http_url), requests, 1, release.network.users))


def as_http(call: Infer) -> bytes:
    return http_request(call.http.path, call.http.body or b"", dict(call.http.headers))


def port_of(url: str) -> int:
    return Connection(url).port
