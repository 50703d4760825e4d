"""The gateway's queue for requests whose images take long to decode."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.decoding_nginx import WAIT, FakeTriton, decoding_nginx, send

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with decoding_nginx(tmp_path_factory.mktemp("nginx")) as port:
        yield port


@pytest.fixture(autouse=True)
def idle() -> None:
    """Wait until the fake server has ended the requests that an earlier test has left."""
    deadline = time.monotonic() + 10
    while any(FakeTriton.now.values()) and time.monotonic() < deadline:
        time.sleep(0.02)


CHEAP, COSTLY = 100_000, 1_000_000  # pixels


def work(port: int, pixels: int, seconds: float, address: str = "127.0.0.1") -> tuple[int, str, float]:
    return send(port, f"/work?pixels={pixels}&seconds={seconds}", None, address)


def test_costly_requests_are_decoded_one_at_a_time_and_cheap_ones_do_not_wait(port: int) -> None:
    FakeTriton.most.clear()
    addresses = [f"127.0.0.{number}" for number in range(2, 8)]
    with ThreadPoolExecutor(12) as pool:
        costly = [pool.submit(work, port, COSTLY, 0.2, address) for address in addresses]
        cheap = [pool.submit(work, port, CHEAP, 0.2, address) for address in addresses]
    assert {future.result()[0] for future in costly + cheap} == {200}
    assert FakeTriton.most["costly"] == 1 and FakeTriton.most["cheap"] > 1
    assert max(future.result()[2] for future in cheap) < 0.2 * 3 < max(future.result()[2] for future in costly)


def test_a_caller_with_many_costly_requests_gets_no_larger_share(port: int) -> None:
    over = threading.Event()

    def send_again_and_again() -> None:
        while not over.is_set():
            work(port, COSTLY, 0.02, "127.0.0.2")

    with ThreadPoolExecutor(20) as pool:
        greedy = [pool.submit(send_again_and_again) for _ in range(20)]
        time.sleep(0.3)
        FakeTriton.done.clear()
        answered = [work(port, COSTLY, 0.02, "127.0.0.3")[0] for _ in range(3)]
        turns = FakeTriton.done["costly"]
        over.set()
    assert [future.result() for future in greedy] == [None] * 20
    # Every second slot, so 6 slots in total, up to 22 on a busy machine; without fairness every 21st, so 63.
    assert answered == [200] * 3 and turns <= 30


def test_a_costly_request_that_gets_no_slot_is_rejected(port: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work, port, COSTLY, WAIT + 0.7, "127.0.0.2")
        time.sleep(0.2)
        status, text, seconds = work(port, COSTLY, 0, "127.0.0.3")
    assert running.result()[0] == 200
    assert status == 429 and "smaller" in text and WAIT <= seconds < WAIT + 0.5


def test_the_slot_of_a_disconnected_client_stays_in_use_while_its_image_is_decoded(port: int) -> None:
    seconds = 1.0  # decoding time of 40 megapixels
    disconnected = http.client.HTTPConnection("127.0.0.1", port)
    disconnected.request("GET", f"/work?pixels=40000000&seconds={seconds}")
    time.sleep(0.2)
    disconnected.close()
    status, _, waited = work(port, COSTLY, 0, "127.0.0.3")
    assert status == 200 and 0.7 * seconds < waited < 2 * seconds


def test_a_client_that_disconnects_while_it_waits_occupies_no_slot(port: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work, port, COSTLY, 0.5, "127.0.0.2")
        time.sleep(0.1)
        for _ in range(3):
            disconnected = http.client.HTTPConnection("127.0.0.1", port, source_address=("127.0.0.3", 0))
            disconnected.request("GET", f"/work?pixels={COSTLY}&seconds=2")
            time.sleep(0.1)
            disconnected.close()
        status, _, waited = work(port, COSTLY, 0, "127.0.0.3")
        assert running.result()[0] == 200
    assert status == 200 and waited < 0.6


def test_a_slot_is_free_again_after_an_error_page(port: int) -> None:
    assert send(port, "/unreachable")[:2] == (502, "no answer")
    assert work(port, COSTLY, 0)[2] < 0.3
    assert work(port, COSTLY, 3.5)[0] == 504
    assert work(port, COSTLY, 0)[2] < 0.3
