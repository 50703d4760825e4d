"""Options, shapes and thresholds of a load test."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.commands import main
from serving.loadtest.plan import LoadPlan, is_loopback, parse_seconds, plan_options
from serving.loadtest.shapes import SHAPES, users_at
from serving.loadtest.verdict import Measurement, check_thresholds
from serving.shared.errors import InputError
from serving.transport.connection import Connection

ROOT = Path(__file__).parents[3]


def plan(**options: Any) -> LoadPlan:
    return LoadPlan(Connection(options.pop("url", "http://127.0.0.1:9")), ROOT, **options)


def measured(requests: int = 100, failures: int = 0, rps: float = 50.0, p99: float = 20.0) -> Measurement:
    return Measurement("HTTP version 1, balanced", requests, failures, rps, 10.0, p99)


@given(
    shape=st.sampled_from(list(SHAPES)),
    part=st.floats(0, 1, exclude_max=True),
    seconds=st.floats(1, 1e5),
    users=st.integers(1, 1000),
)
def test_every_shape_has_between_one_and_all_users(shape: str, part: float, seconds: float, users: int) -> None:
    elapsed = part * seconds
    assert elapsed >= seconds or 1 <= users_at(shape, elapsed, seconds, users) <= users
    assert users_at(shape, seconds, seconds, users) is None


def test_each_shape_has_its_documented_course() -> None:
    def course(shape: str) -> list[int | None]:
        return [users_at(shape, second, 100, 50) for second in range(0, 100, 10)]

    assert course("constant") == [50] * 10
    assert course("steps") == [10, 10, 20, 20, 30, 30, 40, 40, 50, 50]
    assert course("spike") == [10, 10, 10, 10, 50, 50, 10, 10, 10, 10]
    assert course("soak") == [1] + [50] * 9


@pytest.mark.parametrize(
    ("measurement", "thresholds", "violations"),
    [
        (measured(), {}, ()),
        (measured(), {"max_p99": 20, "min_rps": 50}, ()),
        (measured(p99=21), {"max_p99": 20}, ("p99 21 ms, allowed 20 ms",)),
        (measured(failures=1), {}, ("failures 1.00%, allowed 0.00%",)),
        (measured(failures=1), {"max_failures": 0.01}, ()),
        (measured(rps=49.9), {"min_rps": 50}, ("49.9 responses/s, required 50",)),
        (measured(failures=10), {"max_failures": 0.1, "min_rps": 46}, ("45.0 responses/s, required 46",)),
        (measured(requests=0, p99=0), {"max_p99": 1, "min_rps": 1}, ("no request succeeded, of 0 sent",)),
        (measured(failures=100), {"max_failures": 1}, ("no request succeeded, of 100 sent",)),
        (measured(p99=math.nan), {"max_p99": 1}, ("p99 nan ms, allowed 1 ms",)),
    ],
)
def test_a_load_test_fails_on_each_threshold_that_it_does_not_meet_and_on_no_other(
    measurement: Measurement, thresholds: dict[str, float], violations: tuple[str, ...]
) -> None:
    result = check_thresholds(measurement, [measurement], plan(**thresholds))
    assert result["missed"] == list(violations)
    assert result["passed"] is not bool(violations)


def test_requests_are_summed_by_model_version() -> None:
    kinds = [
        Measurement("HTTP version 1, balanced", 5, 1, 0, 0, 0),
        Measurement("HTTP version 12, adjusted", 7, 0, 0, 0, 0),
        Measurement("HTTP version 12, balanced", 2, 0, 0, 0, 0),
        Measurement("HTTP no response, adjusted", 3, 3, 0, 0, 0),
    ]
    assert check_thresholds(measured(), kinds, plan(max_failures=1))["versions"] == {
        "1": {"requests": 5, "failures": 1, "balanced": 5},
        "12": {"requests": 9, "failures": 0, "adjusted": 7, "balanced": 2},
    }


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("2h", 7200), (" 1m5s ", 65)]
)
def test_a_time_span_is_parsed_into_seconds(text: str, seconds: int) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-3s", "1.5m", "3s2m", "5 m"])
def test_an_invalid_time_span_is_rejected(text: str) -> None:
    with pytest.raises(InputError, match="expected a time span such as 90s, 10m or 1h30m"):
        parse_seconds(text)


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
def test_an_invalid_plan_is_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(**options)


@pytest.mark.slow
def test_the_command_and_the_locust_file_have_every_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["loadtest", "--help"]) == 0
    command = capsys.readouterr().out
    assert all(f"{option.flag} " in command for option in plan_options())
    names = [name.partition("=")[0] for name in plan(rate=1.0, max_p99=1.0, min_rps=1.0).locust_arguments()]
    assert names == [
        *("--host", "--images", "--users", "--run-time", "--rate", "--shape", "--prior", "--adjusted-share", "--batch"),
        *("--request-timeout", "--max-p99", "--max-failures", "--min-rps"),
    ]
    program = "import argparse; from serving.loadtest.locustfile import add_options"
    program += "; p = argparse.ArgumentParser(); add_options(p)"
    listed = subprocess.run(
        [sys.executable, "-c", f"{program}; p.print_help()"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert all(f"{name} " in listed for name in names if name not in ("--host", "--users", "--run-time"))


def test_loopback_is_detected_by_address() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "10.1.1.1", "example.com", "127.0.0.1.example.com", ""]))
    assert LoadPlan(Connection("http://10.0.0.1:8000"), Path(__file__).parent, allow_remote=True).allow_remote
