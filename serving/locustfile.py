"""Locust users for a Tailor server: HTTP in Triton's binary form, and gRPC. `tailor loadtest` runs it with checks around.

    locust -f serving/locustfile.py --headless --host http://127.0.0.1:8000 --images photos --users 16 --run-time 30s

The address decides the protocol. Requests are made before the test from the images of a folder, a share of them under
--prior, the others balanced. Rows in the reports are named by the model version that answered. With --rate the users
are sources whose requests come at random times, and the time until an answer counts from when its request was due, so
that a server that falls behind cannot hide it by being asked less.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group
from locust import LoadTestShape, User, constant, events, task
from locust.runners import MasterRunner, WorkerRunner
from locust.stats import calculate_response_time_percentile

from serving.atomic import write_file
from serving.client import Client
from serving.connection import Connection
from serving.errors import InputError, ServingError
from serving.load.mix import Mix, make_mix
from serving.load.plan import HEADERS_VARIABLE, Thresholds
from serving.load.senders import Failed, Sender, make_sender
from serving.load.shapes import SHAPES, users_at
from serving.load.verdict import Measured, is_answer, judge, request_name

SHAPED_SECONDS = 60  # of a shape that was given no --run-time
IN_FLIGHT = 256  # unanswered requests of one source, above which it drops new ones and counts them as failures
AFTER_FAILURE = 0.1  # seconds; else the users of a server that is gone would ask thousands of times a second, and fail
DRAIN = 5.0  # seconds that open requests get at the end
logger = logging.getLogger("tailor.loadtest")


class ClassifierUser(User):
    """Asks for one prepared request after another, or is a source of them."""

    abstract = True
    protocol = ""
    wait_time = constant(0)

    def on_start(self) -> None:
        self._load: Load = self.environment.tailor_load
        self._open, self._due = Group(), time.perf_counter()

    def on_stop(self) -> None:
        self._open.join(timeout=DRAIN)

    @task
    def classify(self) -> None:
        """One request; of a source, one arrival."""
        rate = self.environment.parsed_options.rate
        if not rate:
            if not self._load.send(time.perf_counter()):
                gevent.sleep(AFTER_FAILURE)
            return
        # The sum of independent Poisson sources is one, whatever the number of users that are at work.
        self._due += random.expovariate(rate / self.environment.parsed_options.num_users)
        gevent.sleep(max(0.0, self._due - time.perf_counter()))
        if len(self._open) >= IN_FLIGHT:
            self._load.drop()
        else:
            self._open.spawn(self._load.send, self._due)


class HttpImages(ClassifierUser):
    """Asks over HTTP."""

    protocol = "http"


class GrpcImages(ClassifierUser):
    """Asks over gRPC, over one channel that all users of a process share."""

    protocol = "grpc"


class Shape(LoadTestShape):
    """--shape over --run-time, up to --users."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        options = self.runner.environment.parsed_options
        constant_shape = options.shape == "constant"
        seconds = options.run_time or (float("inf") if constant_shape else SHAPED_SECONDS)
        elapsed = self.get_run_time()
        if elapsed >= seconds:
            return None
        users = options.num_users if constant_shape else users_at(options.shape, elapsed, seconds, options.num_users)
        return users, float(options.num_users)


class Load:
    """What a process needs to send: its requests and its connection."""

    def __init__(self, environment: Any, mix: Mix, sender: Sender) -> None:
        self._request, self._mix, self._sender = environment.events.request, mix, sender

    def send(self, due: float) -> bool:
        """One request, reported with the milliseconds from when it was due to its answer; whether one came."""
        label, call = self._mix.draw()
        version, length, problem = None, 0, None
        try:
            version, length = self._sender.send(call)
        except Failed as error:
            problem = error
        self._report(label, version, (time.perf_counter() - due) * 1000, length, problem)
        return problem is None

    def drop(self) -> None:
        """An arrival that is not sent, because too many before it have no answer yet."""
        self._report("dropped", None, 0.0, 0, Failed(f"not sent: {IN_FLIGHT} requests of this source are unanswered"))

    def close(self) -> None:
        self._sender.close()

    def _report(self, label: str, version: int | None, milliseconds: float, length: int, problem: Any) -> None:
        self._request.fire(
            request_type=self._sender.kind,
            name=request_name(version, label),
            response_time=milliseconds,
            response_length=length,
            exception=problem,
            context={"model_version": version, "prior": label},
        )


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """The options of this load test, beside Locust's own. Paths stay text: Locust's messages to its workers hold no other."""
    group = parser.add_argument_group("tailor")
    group.add_argument("--images", default="artifacts/evaluation/samples", help="folder of images")
    group.add_argument(
        "--prior", default="train", help="balanced, train, a number or a file, for the adjusted requests"
    )
    group.add_argument("--adjusted-share", type=float, default=0.5, help="share of requests under --prior, 0 to 1")
    group.add_argument("--batch", type=int, default=1, help="images in a request")
    group.add_argument("--rate", type=float, default=None, help="requests per second in all, answered or not")
    group.add_argument("--shape", choices=list(SHAPES), default="constant", help="users over time")
    group.add_argument("--request-timeout", type=float, default=10.0, help="seconds")
    group.add_argument("--ca-file", default=None, help="PEM of the CAs to trust")
    group.add_argument("--max-p99", type=float, default=None, help="milliseconds; above it the test fails")
    group.add_argument("--max-failures", type=float, default=0.0, help="share; above it the test fails")
    group.add_argument("--min-rps", type=float, default=None, help="answers per second; below it the test fails")
    group.add_argument("--summary", default=None, help="JSON file for the result and the verdict")


@events.init.add_listener
def prepare(environment: Any, **_: Any) -> None:
    """Choose the users by the address, and make the requests; an error is one line and ends Locust with its status."""
    options = environment.parsed_options
    try:
        if not environment.host:
            raise InputError("--host is missing; give http://127.0.0.1:8000 or grpc://127.0.0.1:8001")
        thresholds = Thresholds(options.max_p99, options.max_failures, options.min_rps)
        headers = json.loads(os.environ.get(HEADERS_VARIABLE, "{}"))
        connection = Connection(environment.host, headers, options.ca_file)
        environment.user_classes = [kind for kind in environment.user_classes if kind.protocol == connection.protocol]
        if not environment.user_classes:
            raise InputError(f"--host is {environment.host}; expected the protocol of the user that was chosen")
        if connection.protocol == "grpc":
            # Before any channel, and after Locust has forked its workers: a channel does not survive a fork.
            import grpc.experimental.gevent

            grpc.experimental.gevent.init_gevent()
        if not isinstance(environment.runner, MasterRunner):
            with Client(connection.url, options.request_timeout, headers=headers, ca_file=options.ca_file) as client:
                mix = make_mix(client, Path(options.images), options.prior, options.adjusted_share, options.batch)
            environment.tailor_load = Load(environment, mix, make_sender(connection, options.request_timeout))
    except ServingError as error:
        logger.error(str(error))
        raise SystemExit(error.exit_code) from None
    measure_processor_time(environment)
    if not isinstance(environment.runner, WorkerRunner):
        environment.events.quitting.add_listener(lambda environment, **_: finish(environment, thresholds))


def measure_processor_time(environment: Any) -> None:
    """Count the processor seconds that sending takes, over all processes, in environment.tailor_seconds."""
    environment.tailor_seconds = 0.0
    began = {"at": 0.0}

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    def start(**_: Any) -> None:
        began["at"] = used()

    def stop(**_: Any) -> None:
        if not isinstance(environment.runner, MasterRunner):
            environment.tailor_seconds = used() - began["at"]

    def tell(client_id: str, data: dict[str, Any]) -> None:  # noqa: ARG001
        data["tailor_seconds"] = used() - began["at"]
        began["at"] = used()

    def hear(client_id: str, data: dict[str, Any]) -> None:  # noqa: ARG001
        environment.tailor_seconds += data.get("tailor_seconds", 0.0)

    environment.events.test_start.add_listener(start)
    environment.events.test_stop.add_listener(stop)
    environment.events.report_to_master.add_listener(tell)
    environment.events.worker_report.add_listener(hear)


def finish(environment: Any, thresholds: Thresholds) -> None:
    """Judge the test, write the summary, and end Locust with status 1 when a threshold was missed."""
    stats = environment.stats
    kinds = [_measured(entry, entry.response_times) for entry in stats.entries.values()]
    # Failures are often quicker than answers and would hide slow ones, so all together is timed by what was answered.
    answered: Counter[int] = Counter()
    for entry in stats.entries.values():
        if is_answer(entry.name):
            answered.update(entry.response_times)
    verdict = judge(_measured(stats.total, answered), kinds, thresholds)
    for line in verdict.missed:
        logger.error("threshold missed: %s", line)
    if environment.parsed_options.summary:
        found = {**verdict.as_mapping(), "processor_seconds": environment.tailor_seconds}
        write_file(Path(environment.parsed_options.summary), json.dumps(found, indent=2) + "\n")
    environment.process_exit_code = 1 if verdict.missed else 0
    if not isinstance(environment.runner, MasterRunner):
        environment.tailor_load.close()


def _measured(entry: Any, times: Mapping[int, int]) -> Measured:
    """A row of Locust's statistics, timed by these milliseconds and how often each was seen."""
    number = sum(times.values())
    p50, p99 = (float(calculate_response_time_percentile(times, number, share)) for share in (0.5, 0.99))
    name = "all" if entry is entry.stats.total else f"{entry.method} {entry.name}"
    return Measured(name, entry.num_requests, entry.num_failures, float(entry.total_rps), p50, p99)
