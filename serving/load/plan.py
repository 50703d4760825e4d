"""What a load test shall do, checked before anything is started."""

from __future__ import annotations

import ipaddress
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from serving.connection import Connection
from serving.errors import InputError
from serving.load.shapes import SHAPES
from serving.priors import parse_prior

MAX_USERS = 1000
MAX_SECONDS = 24 * 3600
MAX_RATE = 100_000.0
MAX_WORKERS = 64
# How the headers reach the processes that send; on their command lines ps would show them.
HEADERS_VARIABLE = "TAILOR_LOADTEST_HEADERS"
TIMESPAN = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")


@dataclass(frozen=True)
class Thresholds:
    """What the server must hold for the test to pass; None is not asked for. p99_ms: milliseconds. failures: a share."""

    p99_ms: float | None = None
    failures: float = 0.0
    rps: float | None = None

    def __post_init__(self) -> None:
        if self.p99_ms is not None and not self.p99_ms > 0:
            raise InputError(f"--max-p99 is {self.p99_ms:g}; expected milliseconds above 0")
        if not 0 <= self.failures <= 1:
            raise InputError(f"--max-failures is {self.failures:g}; expected a share from 0 to 1")
        if self.rps is not None and not self.rps > 0:
            raise InputError(f"--min-rps is {self.rps:g}; expected requests per second above 0")


@dataclass(frozen=True)
class LoadPlan:
    """One load test. Raises InputError naming the option that is not usable.

    connection: the server. images: a folder. seconds: how long. users: askers that each wait for their answer (a closed
    workload), or, with rate, sources whose requests come at random times whether or not the server keeps up (an open
    one), `rate` a second in all. shape: how many of the users are at work over time. adjusted_share: the share of
    requests under `prior`, the others being balanced. batch: images a request. workers: processes that send.
    """

    connection: Connection
    images: Path
    users: int = 16
    seconds: int = 30
    rate: float | None = None
    shape: str = "constant"
    prior: str = "train"
    adjusted_share: float = 0.5
    batch: int = 1
    workers: int = 1
    timeout: float = 10.0
    allow_remote: bool = False
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        if not self.allow_remote and not is_loopback(self.connection.host):
            raise InputError(
                f"{self.connection.url} is not on this machine; load may go to a server of your own alone: "
                "add --allow-remote if it is"
            )
        bounds = {
            "--users": (self.users, MAX_USERS),
            "--time": (self.seconds, MAX_SECONDS),
            "--batch": (self.batch, 64),
        }
        for option, (value, most) in {**bounds, "--workers": (self.workers, MAX_WORKERS)}.items():
            if not 1 <= value <= most:
                raise InputError(f"{option} is {value}; expected 1 to {most}")
        if self.workers > self.users:
            raise InputError(f"--workers is {self.workers}, above --users {self.users}; a worker needs a user at least")
        if self.rate is not None and not 0 < self.rate <= MAX_RATE:
            raise InputError(f"--rate is {self.rate:g}; expected requests per second above 0, at most {MAX_RATE:g}")
        if self.shape not in SHAPES:
            raise InputError(f"--shape is {self.shape!r}; expected one of {', '.join(SHAPES)}")
        if not 0 <= self.adjusted_share <= 1:
            raise InputError(f"--adjusted-share is {self.adjusted_share:g}; expected a share from 0 to 1")
        parse_prior(self.prior)
        if not self.images.is_dir():
            raise InputError(f"--images is {self.images}, no folder; give one with JPEG, PNG or WebP files")

    def locust_arguments(self) -> list[str]:
        """The plan as arguments of `locust -f serving/locustfile.py`. Headers are not among them: ps would show them."""
        given: dict[str, object] = {
            "--host": self.connection.url,
            "--users": self.users,
            "--run-time": f"{self.seconds}s",
            "--images": self.images,
            "--rate": self.rate,
            "--shape": self.shape,
            "--prior": self.prior,
            "--adjusted-share": self.adjusted_share,
            "--batch": self.batch,
            "--request-timeout": self.timeout,
            "--ca-file": self.connection.ca_file,
            "--max-p99": self.thresholds.p99_ms,
            "--max-failures": self.thresholds.failures,
            "--min-rps": self.thresholds.rps,
        }
        return [f"{name}={value}" for name, value in given.items() if value is not None]

    def described(self) -> str:
        """The command that makes this test again, without its secrets."""
        return shlex.join(["locust", "-f", "serving/locustfile.py", "--headless", *self.locust_arguments()])


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def seconds_of(text: str) -> int:
    """Seconds of a time span such as 90, 90s, 10m or 1h30m. Raises InputError."""
    found = TIMESPAN.fullmatch(text.strip())
    if not found or not any(found.groups()):
        raise InputError(f"--time is {text!r}; expected a time such as 90s, 10m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return hours * 3600 + minutes * 60 + seconds
