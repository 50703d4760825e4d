"""Load tests: sent requests and their timing, reports, and safety checks."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import psutil
import pytest
from conftest import picture

from serving.client.sync_client import Client
from serving.commands import main
from serving.commands.loadtest import load_table
from serving.loadtest.plan import LoadPlan
from serving.loadtest.request_mix import ADJUSTED, BALANCED, make_mix
from serving.loadtest.run import run
from serving.loadtest.senders import RequestFailed, make_sender
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError, ServingError
from serving.transport.connection import Connection
from tests.support.faulty_server import FaultyGrpc, FaultyHttp, answers, grpc_server, hang_up

Tailor = Callable[..., CompletedProcess[str]]


ROOT = Path(__file__).parents[3]


SECRET = "s3cret-of-the-load-test"  # pragma: allowlist secret


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(5):
        (folder / f"{seed}.png").write_bytes(picture(seed))
    return folder


def test_the_error_of_a_missing_locust_names_the_extra(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ServingError, match=r"locust is not installed; run `pip install -e '\.\[loadtest\]'`"):
        run(LoadPlan(Connection("http://127.0.0.1:9"), images), tmp_path / "report", lambda _: None)


@pytest.mark.end_to_end
def test_a_mix_contains_every_image_under_both_priors(server: TritonServer, images: Path) -> None:
    with Client(server.http_url) as client:
        mix = make_mix(client, images, "0.25", 0.3, batch=2)
        assert len(mix.requests[BALANCED]) == len(mix.requests[ADJUSTED]) == 3
        sent = {bytes(row[0]) for call in mix.requests[ADJUSTED] for row in call.inputs["image"]}
        assert sent == {picture(seed) for seed in range(5)}
        priors = {label: {call.inputs["prior"][0, 0] for call in mix.requests[label]} for label in mix.requests}
        assert priors == {BALANCED: {b"0.0"}, ADJUSTED: {b"0.25"}}
        drawn = [mix.draw()[0] for _ in range(2000)]
        assert 0.25 < drawn.count(ADJUSTED) / len(drawn) < 0.35
        with pytest.raises(InputError, match="9 images are more than the 8"):
            make_mix(client, images, "train", 0.5, batch=9)


@pytest.mark.end_to_end
def test_senders_return_the_version_and_raise_every_failure(server: TritonServer, images: Path) -> None:
    with Client(server.http_url) as client:
        call = make_mix(client, images, "train", 1.0, 1).requests[ADJUSTED][0]
    for url in (server.http_url, server.grpc_url):
        sender = make_sender(Connection(url), 5)
        version, length = sender.send(call)
        sender.close()
        assert version == 1
        assert length > 50
    for fault, message in (
        (answers("503 Busy", b"full"), "HTTP 503: full"),
        (answers("200 OK", b"{}"), "not Triton's"),
    ):
        with FaultyHttp(None, [fault]) as faulty, pytest.raises(RequestFailed, match=message):
            make_sender(Connection(faulty.url), 5).send(call)
    with FaultyHttp(None, [hang_up], forever=True) as faulty, pytest.raises(RequestFailed, match="closed"):
        make_sender(Connection(faulty.url), 5).send(call)


@pytest.mark.end_to_end
def test_a_load_test_over_http_passes_and_writes_reports(
    tailor: Tailor, server: TritonServer, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "headers.txt").write_text(f"Authorization: Bearer {SECRET}\n")
    report = tmp_path / "report"
    with FaultyHttp((server.host, server.ports["--http-port"])) as between:
        ended = tailor(
            *("loadtest", "--url", between.url, "--images", images, "--users", 4, "--time", "3s", "--report", report),
            *("--header", "@headers.txt", "--max-p99", 5000, "--min-rps", 1, "--prior", "train"),
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        heads = [part for request in between.requests for part in request.split(b"\r\n\r\n") if b"/infer HTTP" in part]
    assert len(heads) > 20
    assert all(f"authorization: bearer {SECRET}".encode() in head.lower() for head in heads)
    assert ": passed" in ended.stdout
    result = json.loads((report / "summary.json").read_text())
    assert result["passed"]
    assert result["total"]["failures"] == 0
    assert result["versions"]["1"]["requests"] == result["total"]["requests"] > 5
    assert min(result["versions"]["1"][label] for label in (BALANCED, ADJUSTED)) > 0
    assert not result["generator_saturated"]
    assert (report / "loadtest.html").stat().st_size > 10_000
    assert "version 1, adjusted" in (report / "loadtest_stats.csv").read_text()
    assert not any(SECRET in path.read_text() for path in report.iterdir())


@pytest.mark.end_to_end
def test_a_load_test_over_grpc_with_two_workers_fails_its_thresholds(
    tailor: Tailor, server: TritonServer, images: Path, tmp_path: Path
) -> None:
    ended = tailor(
        *("loadtest", "--url", server.grpc_url, "--images", images, "--users", 4, "--time", "4s"),
        *("--workers", 2, "--rate", 40, "--shape", "steps", "--max-p99", 0.01, "--min-rps", 1e6, "--adjusted-share", 0),
        *("--report", tmp_path / "report", "--json"),
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("tailor: load test failed: p99 ")
    assert "responses/s, required 1e+06" in ended.stderr
    assert ended.stderr.count("\n") == 1
    result = json.loads(ended.stdout)
    assert not result["passed"]
    assert [kind["name"] for kind in result["kinds"]] == ["gRPC version 1, balanced"]
    # One to five fifths of the rate, four seconds each; Poisson arrivals scatter.
    assert 30 < result["total"]["requests"] < 160


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.parametrize(("shape", "seconds"), [("spike", 10), ("soak", 5)])
def test_the_number_of_users_follows_the_shape_and_every_request_succeeds(
    tailor: Tailor, server: TritonServer, images: Path, tmp_path: Path, shape: str, seconds: int
) -> None:
    users, report = 10, tmp_path / "report"
    ended = tailor(
        *("loadtest", "--url", server.grpc_url, "--images", images, "--users", users, "--time", f"{seconds}s"),
        *("--shape", shape, "--report", report, "--json"),
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    result = json.loads(ended.stdout)["total"]
    assert result["failures"] == 0
    assert result["requests"] > 100
    with (report / "loadtest_stats_history.csv").open() as lines:
        counted = [int(row["User Count"]) for row in csv.DictReader(lines) if row["Name"] == "Aggregated"]
    history = [count for count in counted if count]  # one per second; the first is before any user
    assert max(history) == users
    if shape == "soak":
        assert history == sorted(history)
        return
    first = history.index(users)
    assert history[:first] == sorted(history[:first])
    assert history[first:] == sorted(history[first:], reverse=True)
    assert (history[0], history[-1]) == (users / 5, users / 5)
    assert history.count(users) <= 4  # two seconds of ten, at a resolution of one second


@pytest.mark.end_to_end
def test_an_open_workload_does_not_wait_for_a_slow_server(
    tailor: Tailor, server: TritonServer, images: Path, tmp_path: Path
) -> None:
    # Eight threads with 0.4 s per request serve 20/s; 60/s are sent anyway and queue.
    slow = FaultyGrpc(server.grpc_url.removeprefix("grpc://"))
    with grpc_server(slow) as url:
        slow.delay_inference(0.4)
        ended = tailor(
            *("loadtest", "--url", url, "--images", images, "--users", 2, "--time", "3s"),
            *("--rate", 60, "--timeout", 30, "--report", tmp_path / "report", "--json"),
        )
    assert (ended.returncode, ended.stderr) == (0, "")
    result = json.loads(ended.stdout)
    assert result["total"]["requests"] > 75  # a closed loop of two users would send 15
    assert result["total"]["p99_ms"] > 1500


@pytest.mark.end_to_end
def test_an_interrupted_load_test_leaves_no_process(server: TritonServer, images: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    command = [sys.executable, "-m", "serving.commands", "loadtest", "--url", server.http_url, "--images", str(images)]
    command += ["--time", "60s", "--users", "4", "--workers", "2", "--report", str(report)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Tests started in the background inherit from the shell that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    log, waited = report / "locust.log", time.monotonic() + 60
    # Locust prints the second line instead of the first if a worker reports late.
    while not (log.is_file() and re.search("All users spawned|Spawning is complete", log.read_text())):
        assert time.monotonic() < waited, log.read_text() if log.is_file() else process.poll()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    running = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any(str(report) in argument for arguments in running for argument in arguments)


def test_a_busy_load_generator_is_reported_below_the_table() -> None:
    row = {"name": "all", "requests": 1, "failures": 0, "rps": 1.0, "p50_ms": 1.0, "p99_ms": 1.0}
    result = {"passed": True, "kinds": [], "total": row, "generator_saturated": True}
    assert load_table(result, "http://127.0.0.1").caption.startswith("Locust used over 90% of a core")
    assert load_table({**result, "generator_saturated": False}, "http://127.0.0.1").caption is None


def test_a_remote_server_needs_allow_remote(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadtest", "--url", "http://192.0.2.1:8000", "--images", str(images)]) == 2
    assert capsys.readouterr() == (
        "",
        "tailor: http://192.0.2.1:8000 is not on this machine; test only a server of your own: "
        "add --allow-remote if it is\n",
    )
