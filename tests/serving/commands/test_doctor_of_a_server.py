"""`tailor doctor`: checks of servers and of the champion."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from conftest import Release

from pipeline.doctor import checks as doctor
from pipeline.doctor.checks import Limits, examine
from serving.repository.promotion_log import LOG_NAME, record
from serving.repository.writer import write_repository
from serving.server.triton_server import TritonServer

ROOT = Path(__file__).parents[3]


@pytest.fixture
def own(release: Release, tmp_path: Path) -> Path:
    return write_repository(release.export_dir, tmp_path / "repository")


def findings(name: str, repository: Path, url: str | None = None, **limits: float) -> list[doctor.Finding]:
    everything = examine(ROOT / "params.yaml", repository, url, Limits(**limits))
    return [finding for finding in everything if finding.name == name]


@pytest.mark.parametrize(("days", "state"), [(1, "ok"), (40, "warning"), (-1, "warning")])
def test_the_champions_age_counts_from_its_promotion(own: Path, monkeypatch, days: int, state: str) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - days * 86400)
    record(own, "promote", 1, 1)
    monkeypatch.setattr(time, "time", lambda: now)
    (finding,) = findings("champion", own, champion_days=30)
    assert finding.state == state and "version 1, promoted" in finding.message
    (own / LOG_NAME).unlink()
    (finding,) = findings("champion", own)
    assert finding.state == "ok" and "version 1, published" in finding.message


def test_a_damaged_champion_is_reported_as_failing(own: Path) -> None:
    (own / "classifier" / "1" / "manifest.json").write_text("{")
    (finding,) = findings("champion", own)
    assert finding.state == "failing" and "manifest.json" in finding.message


def test_an_unreachable_server_is_reported_as_failing(own: Path, unused_address: str) -> None:
    (finding,) = findings("server", own, unused_address)
    assert finding.state == "failing" and unused_address in finding.message


@pytest.fixture
def unused_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.end_to_end
def test_a_running_server_is_reported_as_ok(server: TritonServer, repository: Path) -> None:
    (finding,) = findings("server", repository, server.http_url)
    assert finding.state == "ok" and "classifier [1]" in finding.message
