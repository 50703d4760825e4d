"""The Locust file of a load test: users that send HTTP (Triton's binary form) or gRPC. `tailor loadtest` runs it.

    locust -f serving/loadtest/locustfile.py --headless --host http://127.0.0.1:8000 --images photos --users 16 --run-time 30s

The URL selects the protocol. Requests are prepared before the test from the images of a folder, a share of them with
--prior, the others balanced. Rows of the reports name the model version of the responses. With --rate (open workload)
each user is a Poisson source of requests, and the response time is measured from the scheduled start of the request, so
that a slow server does not reduce the load and hide its delay (coordinated omission).
"""

from __future__ import annotations

import json
import logging
import os
import random
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

from serving.client.sync_client import Client
from serving.loadtest.plan import HEADERS_VARIABLE, LOCUST_NAMES, RUN_OPTIONS, LoadPlan, PlanOption, plan_options
from serving.loadtest.request_mix import Mix, make_mix
from serving.loadtest.senders import RequestFailed, Sender, make_sender
from serving.loadtest.shapes import users_at
from serving.loadtest.verdict import VERSION, Measurement, check_thresholds, request_name
from serving.shared.atomic import write_file
from serving.shared.errors import InputError, ServingError
from serving.transport.connection import Connection

SHAPED_SECONDS = 60  # duration of a shape without --run-time
IN_FLIGHT = 256  # requests of one source in flight; above it new requests are dropped and counted as failures
AFTER_FAILURE = 0.1  # seconds between a failure and the user's next request; without it thousands fail per second
DRAIN = 5.0  # seconds to wait for open requests at the end
logger = logging.getLogger("tailor.loadtest")


class ClassifierUser(User):
    """Sends prepared requests one after another (closed workload), or at random times with --rate (open workload)."""

    wait_time = constant(0)

    def on_start(self) -> None:
        self._load: RequestLoad = self.environment.tailor_load
        self._open, self._due = Group(), time.perf_counter()

    def on_stop(self) -> None:
        self._open.join(timeout=DRAIN)

    @task
    def classify(self) -> None:
        """Send one request; with --rate, wait for its scheduled start and send it without waiting for the response."""
        rate = self.environment.parsed_options.rate
        if not rate:
            if not self._load.send(time.perf_counter()):
                gevent.sleep(AFTER_FAILURE)
            return
        # The sum of independent Poisson sources is a Poisson source, for any number of active users.
        self._due += random.expovariate(rate / self.environment.parsed_options.num_users)
        gevent.sleep(max(0.0, self._due - time.perf_counter()))
        if len(self._open) >= IN_FLIGHT:
            self._load.drop()
        else:
            self._open.spawn(self._load.send, self._due)


class UserShape(LoadTestShape):
    """Number of users over time: --shape over --run-time, up to --users."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        options = self.runner.environment.parsed_options
        seconds = options.run_time or (float("inf") if options.shape == "constant" else SHAPED_SECONDS)
        users = users_at(options.shape, self.get_run_time(), seconds, options.num_users)
        return None if users is None else (users, float(options.num_users))


class RequestLoad:
    """The prepared requests and the connection of one sending process."""

    def __init__(self, environment: Any, mix: Mix, sender: Sender) -> None:
        self._request, self._mix, self.sender = environment.events.request, mix, sender

    def send(self, due: float) -> bool:
        """Send one request and report the milliseconds from `due` to the response; return whether it succeeded."""
        label, call = self._mix.draw()
        version, length, error = None, 0, None
        try:
            version, length = self.sender.send(call)
        except RequestFailed as failure:
            error = failure
        self._report(label, version, (time.perf_counter() - due) * 1000, length, error)
        return error is None

    def drop(self) -> None:
        """Report a request that is not sent because IN_FLIGHT requests are open."""
        self._report(
            "dropped", None, 0.0, 0, RequestFailed(f"not sent: {IN_FLIGHT} requests of this source are unanswered")
        )

    def _report(self, label: str, version: int | None, milliseconds: float, length: int, error: Any) -> None:
        self._request.fire(
            request_type=self.sender.kind,
            name=request_name(version, label),
            response_time=milliseconds,
            response_length=length,
            exception=error,
            context={"model_version": version, "prior": label},
        )


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Add the options of LoadPlan to Locust's. Paths stay strings: Locust's messages to its workers carry no Path."""
    group = parser.add_argument_group("tailor")
    for option in locust_options():
        parsed_type = str if option.kind is Path else option.kind
        default = str(option.default) if option.kind is Path else option.default
        flag = LOCUST_NAMES.get(option.name, option.flag)
        group.add_argument(flag, dest=option.name, type=parsed_type, default=default, help=option.help)
    group.add_argument("--ca-file", default=None, help="PEM file of the CAs to trust")
    group.add_argument("--summary", default=None, help="JSON file for the result and the verdict")


def locust_options() -> list[PlanOption]:
    """Return the options of a load test that Locust itself does not have."""
    return [option for option in plan_options() if option.name not in (*RUN_OPTIONS, "users", "seconds")]


@events.init.add_listener
def prepare(environment: Any, **_: Any) -> None:
    """Prepare the requests and the connection. An error is logged as one line, and Locust exits with its status."""
    options = environment.parsed_options
    try:
        if not environment.host:
            raise InputError("--host is missing; give http://127.0.0.1:8000 or grpc://127.0.0.1:8001")
        headers = json.loads(os.environ.get(HEADERS_VARIABLE, "{}"))
        connection = Connection(environment.host, headers, options.ca_file)
        values = {option.name: getattr(options, option.name) for option in locust_options()}
        plan = LoadPlan(connection, allow_remote=True, **{**values, "images": Path(options.images)})
        if connection.protocol == "grpc":
            # Before any channel is opened and after Locust has forked its workers: a channel does not survive a fork.
            import grpc.experimental.gevent

            grpc.experimental.gevent.init_gevent()
        if not isinstance(environment.runner, MasterRunner):
            with Client(connection.url, plan.timeout, headers=headers, ca_file=options.ca_file) as client:
                mix = make_mix(client, plan.images, plan.prior, plan.adjusted_share, plan.batch)
            environment.tailor_load = RequestLoad(environment, mix, make_sender(connection, plan.timeout))
    except ServingError as error:
        logger.error(str(error))
        raise SystemExit(error.exit_code) from None
    if not isinstance(environment.runner, WorkerRunner):
        environment.events.quitting.add_listener(lambda environment, **_: finish(environment, plan))


def finish(environment: Any, plan: LoadPlan) -> None:
    """Check the thresholds, write the summary, and set Locust's exit status to 1 when a threshold is not met."""
    stats = environment.stats
    kinds = [_measurement(entry, entry.response_times) for entry in stats.entries.values()]
    # Failures are often faster than responses and would hide slow ones: the percentiles exclude them.
    times_of_responses: Counter[int] = Counter()
    for entry in stats.entries.values():
        if VERSION.search(entry.name):
            times_of_responses.update(entry.response_times)
    result = check_thresholds(_measurement(stats.total, times_of_responses), kinds, plan)
    for line in result["missed"]:
        logger.error("threshold not met: %s", line)
    if environment.parsed_options.summary:
        result["generator_saturated"] = environment.runner.cpu_log_warning()
        write_file(Path(environment.parsed_options.summary), json.dumps(result, indent=2) + "\n")
    environment.process_exit_code = 1 if result["missed"] else 0
    if not isinstance(environment.runner, MasterRunner):
        environment.tailor_load.sender.close()


def _measurement(entry: Any, times: Mapping[int, int]) -> Measurement:
    """Convert a row of Locust's statistics. times: the number of requests by response time in milliseconds."""
    number = sum(times.values())
    p50, p99 = (float(calculate_response_time_percentile(times, number, share)) for share in (0.5, 0.99))
    name = "all" if entry is entry.stats.total else f"{entry.method} {entry.name}"
    return Measurement(name, entry.num_requests, entry.num_failures, float(entry.total_rps), p50, p99)
