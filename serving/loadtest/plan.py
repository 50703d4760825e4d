"""Options of a load test, defined once in `LoadPlan` for `tailor loadtest` and the Locust file."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from typer import Option

from serving.client.priors import parse_prior
from serving.loadtest.shapes import SHAPES
from serving.shared.errors import InputError
from serving.transport.connection import Connection

# Environment variable with the headers for the Locust processes: a command line would be visible in `ps`.
HEADERS_VARIABLE = "TAILOR_LOADTEST_HEADERS"
TIMESPAN = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")
# LOCUST_NAMES: options with another name in Locust. RUN_OPTIONS: options that the Locust file does not need.
LOCUST_NAMES = {"users": "--users", "seconds": "--run-time", "timeout": "--request-timeout"}
RUN_OPTIONS = ("workers", "allow_remote")
POSITIVE = math.ulp(0.0)


class Bounds(NamedTuple):
    """The smallest and largest allowed value of an option, and their text in an error message."""

    low: float
    high: float
    expected: str


class PlanOption(NamedTuple):
    """One option. kind: int, float, str, Path or bool."""

    name: str
    flag: str
    kind: type
    default: Any
    bounds: Bounds | None
    help: str


SHARE, UP_TO_64 = Bounds(0, 1, "a share from 0 to 1"), Bounds(1, 64, "1 to 64")


def parse_seconds(text: str | int) -> int:
    """Parse a time span such as 90, 90s, 10m or 1h30m into seconds. Raises InputError."""
    match = TIMESPAN.fullmatch(str(text).strip())
    if not match or not any(match.groups()):
        raise InputError(f"--time is {text!r}; expected a time span such as 90s, 10m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


@dataclass(frozen=True)
class LoadPlan:
    """Options of one load test: every field but `connection`. Raises InputError naming the invalid option.

    Without `rate` the workload is closed: each user waits for its response. With `rate` the workload is open: requests
    are sent at random times, `rate` per second in total, also when the server is slower.
    """

    connection: Connection
    images: Annotated[Path, Option(help="Folder of images to send, with the folders in it.")] = Path(
        "artifacts/evaluation/samples"
    )
    users: Annotated[
        int, Option(help="Concurrent users, each waiting for its response."), Bounds(1, 1000, "1 to 1000")
    ] = 16
    seconds: Annotated[
        int,
        Option("--time", parser=parse_seconds, metavar="TIME", help="Duration: 90s, 10m, 1h30m."),
        Bounds(1, 86_400, "1 to 86400"),
    ] = 30
    rate: Annotated[
        float | None,
        Option(help="Requests per second in total, sent whether or not responses arrive; without it users wait."),
        Bounds(POSITIVE, 100_000, "requests per second above 0, at most 100000"),
    ] = None
    shape: Annotated[
        str, Option(metavar="|".join(SHAPES), help="Users over time: all, in steps, a spike, or a soak.")
    ] = "constant"
    prior: Annotated[str, Option(metavar="balanced|train|live|NUMBER|FILE", help="Prior of the adjusted requests.")] = (
        "train"
    )
    adjusted_share: Annotated[float, Option(help="Share of requests under --prior; the others balanced."), SHARE] = 0.5
    batch: Annotated[int, Option(help="Images in a request."), UP_TO_64] = 1
    workers: Annotated[int, Option(help="Processes that send; one is not enough for a fast model."), UP_TO_64] = 1
    timeout: Annotated[
        float, Option(help="Seconds after which a request has failed."), Bounds(POSITIVE, math.inf, "seconds above 0")
    ] = 10.0
    max_p99: Annotated[
        float | None,
        Option(help="Fail above this 99th percentile of the response time, in milliseconds."),
        Bounds(POSITIVE, math.inf, "milliseconds above 0"),
    ] = None
    max_failures: Annotated[float, Option(help="Fail above this share of failed requests, 0 to 1."), SHARE] = 0.0
    min_rps: Annotated[
        float | None,
        Option(help="Fail below this number of responses per second."),
        Bounds(POSITIVE, math.inf, "requests per second above 0"),
    ] = None
    allow_remote: Annotated[bool, Option(help="Allow a server that is not on this machine.")] = False

    def __post_init__(self) -> None:
        if not self.allow_remote and not is_loopback(self.connection.host):
            raise InputError(
                f"{self.connection.url} is not on this machine; test only a server of your own: "
                "add --allow-remote if it is"
            )
        for option in plan_options():
            value = getattr(self, option.name)
            if option.bounds and value is not None and not option.bounds.low <= value <= option.bounds.high:
                raise InputError(f"{option.flag} is {value:.15g}; expected {option.bounds.expected}")
        if self.workers > self.users:
            raise InputError(f"--workers is {self.workers}, above --users {self.users}; each worker needs a user")
        if self.shape not in SHAPES:
            raise InputError(f"--shape is {self.shape!r}; expected one of {', '.join(SHAPES)}")
        parse_prior(self.prior)
        if not self.images.is_dir():
            raise InputError(f"--images is {self.images}, not a folder; give one with JPEG, PNG or WebP files")

    def locust_arguments(self) -> list[str]:
        """Return the arguments for `locust -f serving/loadtest/locustfile.py`, without headers (visible in `ps`)."""
        values = {"--host": self.connection.url, "--ca-file": self.connection.ca_file}
        for option in plan_options():
            if option.name not in RUN_OPTIONS:
                values[LOCUST_NAMES.get(option.name, option.flag)] = getattr(self, option.name)
        return [f"{name}={value}" for name, value in values.items() if value is not None]


@cache
def plan_options() -> tuple[PlanOption, ...]:
    """Return the options of a load test, from the fields of LoadPlan."""
    hints, options = get_type_hints(LoadPlan, include_extras=True), []
    for field in fields(LoadPlan)[1:]:
        kind, info, *bounds = get_args(hints[field.name])
        flag = info.default if isinstance(info.default, str) else f"--{field.name.replace('_', '-')}"
        plain = (get_args(kind) or (kind,))[0]
        options.append(PlanOption(field.name, flag, plain, field.default, next(iter(bounds), None), info.help))
    return tuple(options)


def is_loopback(host: str) -> bool:
    """Return whether a host is `localhost` or a loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
