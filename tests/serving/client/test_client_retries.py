"""Retries and errors of the clients against proxies that inject faults."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import tenacity
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st

from serving.client.async_client import AsyncClient
from serving.client.predictions import Prediction
from serving.client.sync_client import Client
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError, ServingError
from serving.transport.failures import (
    DeadlineExceeded,
    ProcessUnhealthy,
    RequestRejected,
    Unavailable,
    grpc_error,
)
from serving.transport.retries import Deadline, Retries
from tests.support.faulty_server import (
    FaultyGrpc,
    FaultyHttp,
    answers,
    grpc_server,
    hang_up,
    http_answer,
    reset,
    says,
    silent,
    trickles,
)

QUICK = Retries(first_wait=0.01)
Predict = Callable[..., list[Prediction]]


def predict_sync(url: str, **options: Any) -> list[Prediction]:
    with Client(url, **{"retries": QUICK, **options}) as client:
        return client.predict([picture(1)], "train")


def predict_async(url: str, **options: Any) -> list[Prediction]:
    async def run() -> list[Prediction]:
        async with AsyncClient(url, **{"retries": QUICK, **options}) as client:
            return await client.predict([picture(1)], "train")

    return asyncio.run(run())


@pytest.fixture(params=[predict_sync, predict_async], ids=["sync", "async"])
def predict(request: pytest.FixtureRequest) -> Predict:
    return request.param


def expected(server: TritonServer) -> list[Prediction]:
    with Client(server.http_url) as client:
        return client.predict([picture(1)], "train")


def http_target(server: TritonServer) -> tuple[str, int]:
    return server.host, server.ports["--http-port"]


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "fault", [reset, hang_up, answers("503 Service Unavailable"), answers("502 Bad Gateway"), says(b"HTTP/1.1 2")]
)
def test_a_temporary_failure_is_retried_over_http(server: TritonServer, predict: Predict, fault: Any) -> None:
    with FaultyHttp(http_target(server), [fault, fault]) as faulty:
        assert predict(faulty.url) == expected(server)
        assert len(faulty.requests) >= 3


@pytest.mark.end_to_end
@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE])
def test_a_temporary_failure_is_retried_over_grpc(
    server: TritonServer, predict: Predict, code: grpc.StatusCode
) -> None:
    handler = FaultyGrpc(server.grpc_url.removeprefix("grpc://"), [code, code])
    with grpc_server(handler) as url:
        assert predict(url) == expected(server)
    assert [method.rpartition("/")[2] for method, _ in handler.calls] == ["ModelConfig"] * 3 + ["ModelInfer"]


def test_an_inference_process_that_does_not_react_is_unavailable_and_only_a_health_check_sees_it_at_once(
    predict: Predict,
) -> None:
    """Triton answers 500 as for an error of the model; on a busy machine a process got no processor time for a second."""
    hung = answers("500 Error", b'{"error": "Stub process \'classifier_0_1\' is not healthy."}')
    for retries, attempts in ((QUICK, 4), (Retries(unhealthy=False), 1)):
        with FaultyHttp(None, [hung], forever=True) as faulty:
            with pytest.raises(ProcessUnhealthy, match=r"'classifier_0_1' is not healthy\. It hangs, has exited, or"):
                predict(faulty.url, retries=retries)
            assert len(faulty.requests) == attempts
    error = grpc_error("grpc://server", Details("message: Stub process 'classifier_0_1' is not healthy."), 1.0)
    assert isinstance(error, ProcessUnhealthy)


class Details:
    """A grpc.RpcError with code INTERNAL."""

    def __init__(self, text: str) -> None:
        self.text = text

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INTERNAL

    def details(self) -> str:
        return self.text


@pytest.mark.end_to_end
def test_a_dropped_connection_is_opened_again(server: TritonServer) -> None:
    with FaultyHttp(http_target(server)) as proxy, Client(proxy.url, retries=QUICK) as client:
        first = client.predict([picture(1)], "train")
        proxy.drop_connections()
        assert client.predict([picture(1)], "train") == first


def test_the_deadline_of_the_first_asynchronous_request_does_not_pay_for_an_import() -> None:
    program = """
import sys
from serving.client.async_client import AsyncClient
AsyncClient("http://127.0.0.1:1")
assert "aiohttp" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_last_error_has_the_number_of_attempts(predict: Predict) -> None:
    with FaultyHttp(None, [answers("503 Service Unavailable")], forever=True) as faulty:
        with pytest.raises(Unavailable, match=r"is not available: HTTP 503; tried 4 times in 0\.\d s"):
            predict(faulty.url)
        assert len(faulty.requests) == 4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (answers("400 Bad Request", b'{"error": "image  is\\nbad"}'), "refused: image is bad"),
        (answers("401 Unauthorized"), "HTTP 401; give credentials with --header"),
        (answers("403 Forbidden"), "HTTP 403; this address or these credentials are not allowed to send this request"),
        (answers("413 Too Large", b"<html>"), "HTTP 413; send fewer or smaller images"),
        (answers("429 Too Many", Retry_After=0), "HTTP 429; send fewer requests"),
        (answers("301 Moved", Location="http://elsewhere"), "moved to http://elsewhere; give that address"),
        (answers("500 Error", b'{"error": "student 1 failed"}'), "refused: student 1 failed"),
    ],
)
def test_a_rejected_request_is_not_retried_over_http(predict: Predict, fault: Any, message: str) -> None:
    # The first requests read the model's inputs; with restricted metadata each request has one row.
    with FaultyHttp(None, [fault], forever=True) as faulty:
        with pytest.raises(RequestRejected, match=message):
            predict(faulty.url)
        assert [request.split()[1] for request in faulty.requests] == [
            b"/v2/models/classifier/config",
            b"/v2/models/segmenter/config",
            b"/v2/models/classifier",
            b"/v2/models/classifier/infer",
        ]


def test_a_rejected_request_is_not_retried_over_grpc(predict: Predict) -> None:
    rejections = [grpc.StatusCode.INVALID_ARGUMENT] * 3  # restricted: both configs, and the inputs
    handler = FaultyGrpc(None, [*rejections, grpc.StatusCode.RESOURCE_EXHAUSTED])
    with grpc_server(handler) as url, pytest.raises(RequestRejected, match="refused: made to fail: RESOURCE_EXHAUSTED"):
        predict(url)
    assert len(handler.calls) == 4


@pytest.mark.parametrize(
    "fault", [silent, trickles(http_answer("200 OK", b"x" * 500)), trickles(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 99)]
)
def test_the_deadline_ends_a_slow_http_response(predict: Predict, fault: Any) -> None:
    with FaultyHttp(None, [fault], forever=True) as faulty:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"did not answer within 0\.4 s; try again or allow a longer"):
            predict(faulty.url, timeout=0.4)
        assert 0.35 < time.monotonic() - began < 1.4
        assert len(faulty.requests) == 1


def test_the_deadline_ends_a_grpc_call(predict: Predict) -> None:
    with grpc_server(FaultyGrpc(None, [2.0])) as url:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"within 0\.4 s"):
            predict(url, timeout=0.4)
        assert 0.35 < time.monotonic() - began < 1.4


@pytest.mark.slow
def test_one_deadline_covers_all_attempts(predict: Predict) -> None:
    many_attempts = Retries(attempts=1000, first_wait=0.05, longest_wait=0.05)
    with FaultyHttp(None, [answers("503 Service Unavailable")], forever=True) as faulty:
        began = time.monotonic()
        # The last wait may end too late for another attempt; then the error is the deadline.
        with pytest.raises((Unavailable, DeadlineExceeded), match=r"tried|within 1 s"):
            predict(faulty.url, timeout=1.0, retries=many_attempts)
        assert time.monotonic() - began < 1.5
        assert 3 < len(faulty.requests) < 1000


def test_a_retry_after_beyond_the_deadline_ends_the_retries(predict: Predict) -> None:
    with FaultyHttp(None, [answers("503 Service Unavailable", Retry_After=30)], forever=True) as faulty:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="HTTP 503"):
            predict(faulty.url, timeout=20)
        assert time.monotonic() - began < 5
        assert len(faulty.requests) == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        http_answer("200 OK", b"\x00\xff" * 50),
        http_answer("200 OK", b"[" * 50_000),
        http_answer("200 OK", b"[1]"),
        http_answer("404 Not Found", b"<html>"),
        http_answer("200 OK", b"\x1f\x8b\x08junk", Content_Encoding="gzip"),
    ],
)
def test_a_response_that_is_not_tritons_is_an_error_in_one_line(predict: Predict, garbage: bytes) -> None:
    with FaultyHttp(None, [says(garbage)], forever=True) as faulty:
        with pytest.raises(ServingError, match=f"no Triton server answers at {faulty.url}") as caught:
            predict(faulty.url)
        assert "\n" not in str(caught.value)


CLASS = b'{"name":"class","datatype":"BYTES","shape":[1,3],"parameters":{"binary_data_size":9}}'
BINARY = b'{"model_version":"1","outputs":[' + CLASS + b"]}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"outputs": 3, "model_version": "1"}',
        BINARY,
        BINARY + b"\xff" * 9,
        BINARY.replace(b"[1,3]", b"[9]"),
    ],
)
def test_an_invalid_inference_response_is_an_error(predict: Predict, body: bytes) -> None:
    config = answers("200 OK", b'{"max_batch_size": 8}')
    nonsense = answers("200 OK", body, Inference_Header_Content_Length=min(len(body), len(BINARY)))
    with FaultyHttp(None, [config, nonsense], forever=True) as faulty:
        with pytest.raises(ServingError, match="no Triton server answers"):
            predict(faulty.url)
        assert len(faulty.requests) == 2


def test_a_grpc_server_that_is_not_triton_is_an_error(predict: Predict) -> None:
    with grpc_server(FaultyGrpc(None)) as url, pytest.raises(ServingError, match=f"no Triton server answers at {url}"):
        predict(url)


@given(attempt=st.integers(1, 60), first=st.floats(0, 5), longest=st.floats(5, 60))
def test_waits_are_random_below_a_bound_that_doubles(attempt: int, first: float, longest: float) -> None:
    retries = Retries(attempts=100, first_wait=first, longest_wait=longest)
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    state.attempt_number = attempt
    waits = [retries.policy(Deadline(1))["wait"](state) for _ in range(5)]
    assert all(0 <= wait <= min(longest, first * 2 ** (attempt - 1)) for wait in waits)
    assert first == 0 or min(longest, first * 2 ** (attempt - 1)) < 1e-9 or len(set(waits)) > 1


@pytest.mark.parametrize("options", [{"attempts": 0}, {"first_wait": -1}, {"first_wait": 3, "longest_wait": 1}])
def test_an_invalid_retry_policy_is_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected attempts >= 1"):
        Retries(**options)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_must_be_above_0(timeout: float) -> None:
    with pytest.raises(InputError, match="expected seconds above 0"):
        Client(timeout=timeout)
