"""Load tests: sent requests and their timing, thresholds, and safety checks."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import psutil
import pytest
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st

from serving.client.sync_client import Client
from serving.commands import main
from serving.commands.loadtest import load_table
from serving.loadtest.plan import LoadPlan, is_loopback, plan_options, seconds_of
from serving.loadtest.request_mix import ADJUSTED, BALANCED, make_mix
from serving.loadtest.run import run
from serving.loadtest.senders import Failed, make_sender
from serving.loadtest.shapes import SHAPES, users_at
from serving.loadtest.verdict import Measured, judge
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError, ServingError
from serving.transport.connection import Connection
from tests.support.faulty_server import FaultyGrpc, FaultyHttp, answers, grpc_server, hang_up

Tailor = Callable[..., CompletedProcess[str]]
ROOT = Path(__file__).parents[3]
SECRET = "s3cret-of-the-load-test"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(5):
        (folder / f"{seed}.png").write_bytes(picture(seed))
    return folder


def plan(images: Path, **options: Any) -> LoadPlan:
    return LoadPlan(Connection(options.pop("url", "http://127.0.0.1:9")), images, **options)


def measured(requests: int = 100, failures: int = 0, rps: float = 50.0, p99: float = 20.0) -> Measured:
    return Measured("HTTP version 1, balanced", requests, failures, rps, 10.0, p99)


@given(
    shape=st.sampled_from(list(SHAPES)),
    part=st.floats(0, 1, exclude_max=True),
    seconds=st.floats(1, 1e5),
    users=st.integers(1, 1000),
)
def test_every_shape_keeps_between_one_user_and_all(shape: str, part: float, seconds: float, users: int) -> None:
    elapsed = part * seconds
    assert elapsed >= seconds or 1 <= users_at(shape, elapsed, seconds, users) <= users
    assert users_at(shape, seconds, seconds, users) is None


def test_shapes_are_what_their_names_say() -> None:
    def course(shape: str) -> list[int | None]:
        return [users_at(shape, second, 100, 50) for second in range(0, 100, 10)]

    assert course("constant") == [50] * 10
    assert course("steps") == [10, 10, 20, 20, 30, 30, 40, 40, 50, 50]
    assert course("spike") == [10, 10, 10, 10, 50, 50, 10, 10, 10, 10]
    assert course("soak") == [1] + [50] * 9


@pytest.mark.parametrize(
    ("measurement", "thresholds", "missed"),
    [
        (measured(), {}, ()),
        (measured(), {"max_p99": 20, "min_rps": 50}, ()),
        (measured(p99=21), {"max_p99": 20}, ("p99 21 ms, allowed 20 ms",)),
        (measured(failures=1), {}, ("failures 1.00%, allowed 0.00%",)),
        (measured(failures=1), {"max_failures": 0.01}, ()),
        (measured(rps=49.9), {"min_rps": 50}, ("49.9 answers/s, required 50",)),
        (measured(failures=10), {"max_failures": 0.1, "min_rps": 46}, ("45.0 answers/s, required 46",)),
        (measured(requests=0, p99=0), {"max_p99": 1, "min_rps": 1}, ("no request was answered, of 0 sent",)),
        (measured(failures=100), {"max_failures": 1}, ("no request was answered, of 100 sent",)),
        (measured(p99=math.nan), {"max_p99": 1}, ("p99 nan ms, allowed 1 ms",)),
    ],
)
def test_a_test_fails_on_what_it_missed_and_on_nothing_else(
    images: Path, measurement: Measured, thresholds: dict[str, float], missed: tuple[str, ...]
) -> None:
    result = judge(measurement, [measurement], plan(images, **thresholds))
    assert result["missed"] == list(missed)
    assert result["passed"] is not bool(missed)


def test_kinds_add_up_by_version(images: Path) -> None:
    kinds = [
        Measured("HTTP version 1, balanced", 5, 1, 0, 0, 0),
        Measured("HTTP version 12, adjusted", 7, 0, 0, 0, 0),
        Measured("HTTP version 12, balanced", 2, 0, 0, 0, 0),
        Measured("HTTP no answer, adjusted", 3, 3, 0, 0, 0),
    ]
    assert judge(measured(), kinds, plan(images, max_failures=1))["versions"] == {
        "1": {"requests": 5, "failures": 1, "balanced": 5},
        "12": {"requests": 9, "failures": 0, "adjusted": 7, "balanced": 2},
    }


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("2h", 7200), (" 1m5s ", 65)]
)
def test_time_spans(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-3s", "1.5m", "3s2m", "5 m"])
def test_other_time_spans_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a time such as 90s, 10m or 1h30m"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://10.0.0.1:8000"}, "http://10.0.0.1:8000 is not on this machine; .* add --allow-remote"),
        ({"url": "grpc://localhost.example:8001"}, "is not on this machine"),
        ({"users": 0}, "--users is 0; expected 1 to 1000"),
        ({"users": 1001}, "--users is 1001"),
        ({"seconds": 0}, "--time is 0"),
        ({"seconds": 90_000}, "--time is 90000; expected 1 to 86400"),
        ({"workers": 3, "users": 2}, "--workers is 3, above --users 2"),
        ({"rate": 0.0}, "--rate is 0; expected requests per second above 0"),
        ({"rate": math.inf}, "--rate is inf"),
        ({"shape": "wave"}, "--shape is 'wave'; expected one of constant, steps, spike, soak"),
        ({"adjusted_share": 1.5}, "--adjusted-share is 1.5"),
        ({"prior": "nosuch.json"}, "no such file exists"),
        ({"batch": 65}, "--batch is 65; expected 1 to 64"),
        ({"timeout": 0.0}, "--timeout is 0; expected seconds above 0"),
        ({"max_p99": 0.0}, "--max-p99 is 0; expected milliseconds above 0"),
        ({"max_p99": math.nan}, "--max-p99 is nan"),
        ({"max_failures": -0.1}, "--max-failures is -0.1; expected a share from 0 to 1"),
        ({"max_failures": 2.0}, "--max-failures is 2"),
        ({"min_rps": 0.0}, "--min-rps is 0; expected requests per second above 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(images: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(images, **options)


@pytest.mark.slow
def test_every_option_is_one_of_the_command_and_of_the_locust_file(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["loadtest", "--help"]) == 0
    command = capsys.readouterr().out
    assert all(f"{option.flag} " in command for option in plan_options())
    given = [name.partition("=")[0] for name in plan(images, rate=1.0, max_p99=1.0, min_rps=1.0).locust_arguments()]
    assert given == [
        *("--host", "--images", "--users", "--run-time", "--rate", "--shape", "--prior", "--adjusted-share", "--batch"),
        *("--request-timeout", "--max-p99", "--max-failures", "--min-rps"),
    ]
    program = "import argparse; from serving.loadtest.locustfile import add_options"
    program += "; p = argparse.ArgumentParser(); add_options(p)"
    listed = subprocess.run(
        [sys.executable, "-c", f"{program}; p.print_help()"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert all(f"{name} " in listed for name in given if name not in ("--host", "--users", "--run-time"))


def test_loopback_is_told_by_address() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "10.1.1.1", "example.com", "127.0.0.1.example.com", ""]))
    assert LoadPlan(Connection("http://10.0.0.1:8000"), Path(__file__).parent, allow_remote=True).allow_remote


def test_without_locust_the_extra_is_named(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ServingError, match=r"locust is not installed; .* pip install 'tailor\[loadtest\]'"):
        run(plan(images), tmp_path / "report", lambda _: None)


@pytest.mark.end_to_end
def test_a_mix_holds_every_image_under_both_priors(server: TritonServer, images: Path) -> None:
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
def test_senders_know_the_version_and_every_failure(server: TritonServer, images: Path) -> None:
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
        with FaultyHttp(None, [fault]) as faulty, pytest.raises(Failed, match=message):
            make_sender(Connection(faulty.url), 5).send(call)
    with FaultyHttp(None, [hang_up], forever=True) as faulty, pytest.raises(Failed, match="closed"):
        make_sender(Connection(faulty.url), 5).send(call)


@pytest.mark.end_to_end
def test_load_over_http_holds_and_leaves_reports(
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
    assert ": held" in ended.stdout
    found = json.loads((report / "summary.json").read_text())
    assert found["passed"]
    assert found["total"]["failures"] == 0
    assert found["versions"]["1"]["requests"] == found["total"]["requests"] > 5
    assert min(found["versions"]["1"][label] for label in (BALANCED, ADJUSTED)) > 0
    assert not found["generator_saturated"]
    assert (report / "loadtest.html").stat().st_size > 10_000
    assert "version 1, adjusted" in (report / "loadtest_stats.csv").read_text()
    assert not any(SECRET in path.read_text() for path in report.iterdir())


@pytest.mark.end_to_end
def test_load_over_grpc_by_two_processes_fails_below_its_thresholds(
    tailor: Tailor, server: TritonServer, images: Path, tmp_path: Path
) -> None:
    ended = tailor(
        *("loadtest", "--url", server.grpc_url, "--images", images, "--users", 4, "--time", "4s"),
        *("--workers", 2, "--rate", 40, "--shape", "steps", "--max-p99", 0.01, "--min-rps", 1e6, "--adjusted-share", 0),
        *("--report", tmp_path / "report", "--json"),
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("tailor: load test failed: p99 ")
    assert "answers/s, required 1e+06" in ended.stderr
    assert ended.stderr.count("\n") == 1
    found = json.loads(ended.stdout)
    assert not found["passed"]
    assert [kind["name"] for kind in found["kinds"]] == ["gRPC version 1, balanced"]
    # One to five fifths of the rate, four seconds each; Poisson arrivals scatter.
    assert 30 < found["total"]["requests"] < 160


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.parametrize(("shape", "seconds"), [("spike", 10), ("soak", 5)])
def test_users_come_and_go_as_the_shape_says_and_each_is_answered(
    tailor: Tailor, server: TritonServer, images: Path, tmp_path: Path, shape: str, seconds: int
) -> None:
    users, report = 10, tmp_path / "report"
    ended = tailor(
        *("loadtest", "--url", server.grpc_url, "--images", images, "--users", users, "--time", f"{seconds}s"),
        *("--shape", shape, "--report", report, "--json"),
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    found = json.loads(ended.stdout)["total"]
    assert found["failures"] == 0
    assert found["requests"] > 100
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
def test_an_open_load_does_not_wait_for_a_server_that_falls_behind(
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
    found = json.loads(ended.stdout)
    assert found["total"]["requests"] > 75  # a closed loop of two users would send 15
    assert found["total"]["p99_ms"] > 1500


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
    log, waited = report / "locust.log", time.monotonic() + 30
    while not (log.is_file() and "All users spawned" in log.read_text()):
        assert time.monotonic() < waited, log.read_text() if log.is_file() else process.poll()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    running = [found.info["cmdline"] or [] for found in psutil.process_iter(["cmdline"])]
    assert not any(str(report) in argument for arguments in running for argument in arguments)


def test_a_busy_load_generator_is_reported_below_the_table() -> None:
    row = {"name": "all", "requests": 1, "failures": 0, "rps": 1.0, "p50_ms": 1.0, "p99_ms": 1.0}
    result = {"passed": True, "kinds": [], "total": row, "generator_saturated": True}
    assert load_table(result, "http://127.0.0.1").caption.startswith("Locust used over 90% of a core")
    assert load_table({**result, "generator_saturated": False}, "http://127.0.0.1").caption is None


def test_load_goes_to_this_machine_unless_told(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadtest", "--url", "http://192.0.2.1:8000", "--images", str(images)]) == 2
    assert capsys.readouterr() == (
        "",
        "tailor: http://192.0.2.1:8000 is not on this machine; put load only on a server of your own: "
        "add --allow-remote if it is\n",
    )
