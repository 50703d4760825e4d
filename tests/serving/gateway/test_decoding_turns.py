"""The gateway's parsing of image headers, and its queue for costly requests, in nginx with a fake of Triton."""

from __future__ import annotations

import collections
import http.client
import io
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

from serving.gateway.config import Gateway
from serving.gateway.nginx_process import find_nginx
from serving.shared.ports import choose_ports
from tests.support.bad_images import chunk, data_url, hostile_images, saved
from tests.support.running_gateway import require_nginx

pytestmark = pytest.mark.slow

LUA = Path(__file__).parents[3] / "serving/gateway/lua"
CONFIG = """
load_module {modules}/ndk_http_module.so;
load_module {modules}/ngx_http_lua_module.so;
daemon off;
pid {folder}/nginx.pid;
error_log stderr error;
worker_processes 2;
events {{ worker_connections 256; }}
http {{
    lua_package_path "{lua}/?.lua;;";
    lua_shared_dict decoding 1m;
    lua_check_client_abort on;
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/unused;
    uwsgi_temp_path {folder}/unused;
    scgi_temp_path {folder}/unused;
    client_max_body_size 40m;
    client_body_buffer_size 40m;
    init_by_lua_block {{
        local decoding = require("decoding")
        decoding.wait_seconds = {wait}
    }}
    server {{
        listen 127.0.0.1:{port};
        log_by_lua_block {{ require("decoding").leave() }}
        error_page 502 504 /_error;
        location = /_error {{ internal; return 200 "no answer"; }}
        location = /pixels {{
            content_by_lua_block {{
                ngx.req.read_body()
                local data = ngx.req.get_body_data() or ""
                local reads = 0
                local function read(offset, count)
                    reads = reads + 1
                    return data:sub(offset + 1, offset + count)
                end
                local before = tonumber(ngx.var.arg_before) or 0
                local pixels = require("decoding").pixels(read, before, #data - before - (tonumber(ngx.var.arg_behind) or 0))
                ngx.print(pixels, " ", reads)
            }}
        }}
        location /work {{
            access_by_lua_block {{
                local refusal = require("decoding").enter(tonumber(ngx.var.arg_pixels))
                if refusal then
                    ngx.status = 429
                    ngx.print(refusal)
                    return ngx.exit(429)
                end
            }}
            proxy_read_timeout 3s;
            proxy_pass http://127.0.0.1:{upstream};
        }}
        location /gone {{
            access_by_lua_block {{ require("decoding").enter(1e6) }}
            proxy_pass http://127.0.0.1:1;
        }}
    }}
}}
"""
CHEAP, COSTLY = 100_000, 1_000_000  # pixels
WAIT = 2  # seconds


class StandIn(BaseHTTPRequestHandler):
    """Fake server: works for the seconds in a request's query, and counts concurrent requests by kind."""

    now: ClassVar[collections.Counter[str]] = collections.Counter()
    most: ClassVar[collections.Counter[str]] = collections.Counter()
    done: ClassVar[collections.Counter[str]] = collections.Counter()
    lock = threading.Lock()

    def do_GET(self) -> None:
        asked = parse_qs(urlsplit(self.path).query)
        kind = "costly" if float(asked["pixels"][0]) > 200_000 else "cheap"
        with self.lock:
            self.now[kind] += 1
            self.most[kind] = max(self.most[kind], self.now[kind])
        time.sleep(float(asked["seconds"][0]))
        with self.lock:
            self.now[kind] -= 1
            self.done[kind] += 1
        try:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
        except OSError:  # the gateway has closed the connection
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of nginx with decoding.lua, in front of a StandIn."""
    require_nginx()
    folder = tmp_path_factory.mktemp("nginx")
    port = choose_ports("127.0.0.1", {"http": 0})["http"]
    stand_in = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=stand_in.serve_forever, daemon=True).start()
    (folder / "nginx.conf").write_text(
        CONFIG.format(
            modules=Gateway().modules, folder=folder, lua=LUA, wait=WAIT, port=port, upstream=stand_in.server_port
        )
    )
    command = [find_nginx(Gateway()), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                send(port, "/pixels")
                break
            except OSError:
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)
        stand_in.shutdown()
        stand_in.server_close()


def send(port: int, path: str, body: bytes | None = None, address: str = "127.0.0.1") -> tuple[int, str, float]:
    """Send a request from a loopback address; return status, text and seconds."""
    started = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20, source_address=(address, 0))
    try:
        connection.request("GET" if body is None else "POST", path, body)
        response = connection.getresponse()
        return response.status, response.read().decode(), time.monotonic() - started
    finally:
        connection.close()


def cost(port: int, data: bytes) -> float:
    return float(send(port, "/pixels", data)[1].split()[0])


def work(port: int, pixels: int, seconds: float, address: str = "127.0.0.1") -> tuple[int, str, float]:
    return send(port, f"/work?pixels={pixels}&seconds={seconds}", None, address)


WIDTH, HEIGHT = 300, 200
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
PICTURES = {
    "png": (saved(NOISE, "PNG"), 1, 0.4),
    "png grey": (saved(NOISE.convert("L"), "PNG"), 1, 0.4),
    "png palette": (saved(NOISE.convert("P"), "PNG"), 1, 0.4),
    "png alpha": (saved(NOISE.convert("RGBA"), "PNG"), 1, 0.4),
    "jpeg": (saved(NOISE, "JPEG"), 0.5, 0.4),
    "jpeg grey": (saved(NOISE.convert("L"), "JPEG"), 0.5, 0.4),
    "jpeg cmyk": (saved(NOISE.convert("CMYK"), "JPEG"), 0.5, 0.4),
    "jpeg with metadata": (saved(NOISE, "JPEG", exif=b"Exif\0\0" + bytes(60_000), comment=b"x" * 90), 0.5, 0.4),
    "jpeg progressive": (saved(NOISE, "JPEG", progressive=True), 1, 0.4),
    "webp lossy": (saved(NOISE, "WEBP"), 1, 1.8),
    "webp lossless": (saved(NOISE, "WEBP", lossless=True), 1, 1.8),
    "webp alpha": (saved(NOISE.convert("RGBA"), "WEBP"), 1, 1.8),
    "webp with metadata": (saved(NOISE, "WEBP", exif=b"Exif\0\0" + bytes(100)), 1, 1.8),
    "webp animation": (saved(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(9)]), 1, 1.8),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_cost_of_an_image_is_that_of_its_pixels_and_bytes(port: int, name: str) -> None:
    data, pixel, byte = PICTURES[name]
    assert Image.open(io.BytesIO(data)).size == (WIDTH, HEIGHT)
    assert cost(port, data) == pytest.approx(WIDTH * HEIGHT * pixel + len(data) * byte)


def test_an_image_between_other_bytes_costs_the_same(port: int) -> None:
    for data, _, _ in PICTURES.values():
        around = send(port, "/pixels?before=100&behind=50", bytes(100) + data + PICTURES["png"][0][:50])[1]
        assert float(around.split()[0]) == cost(port, data)


@pytest.mark.parametrize("name", PICTURES)
def test_an_image_as_base64_text_costs_what_its_file_costs(port: int, name: str) -> None:
    data, _, _ = PICTURES[name]
    for extra in range(3):  # the lengths of base64's padding
        file = data + bytes(extra)
        around = send(port, "/pixels?before=7&behind=5", b"QUJDREE" + data_url(file) + b"QUJDR")[1]
        assert float(around.split()[0]) == pytest.approx(cost(port, file), abs=4)


def test_a_hostile_image_as_base64_text_costs_what_its_file_costs(port: int) -> None:
    for name, data in hostile_images().items():
        if len(data) < 20_000_000:
            found, reads = send(port, "/pixels", data_url(data))[1].split()
            assert float(found) == pytest.approx(cost(port, data), abs=4) and int(reads) <= 4002, name


@pytest.mark.parametrize("side", [1, 2, 255, 256, 16383])
def test_every_size_is_read_to_the_pixel(port: int, side: int) -> None:
    image = Image.new("L", (side, 3))
    for form, options, pixel, byte in [
        ("PNG", {}, 1, 0.4),
        ("JPEG", {}, 0.5, 0.4),
        ("WEBP", {}, 1, 1.8),
        ("WEBP", {"lossless": True}, 1, 1.8),
    ]:
        data = saved(image, form, **options)
        assert cost(port, data) == pytest.approx(side * 3 * pixel + len(data) * byte, rel=1e-9), (form, options)


def header(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def test_a_file_that_pillow_refuses_unread_costs_nothing(port: int) -> None:
    hostile = hostile_images()
    for name in ["empty", "text", "zeros", "gif", "bmp", "tiff", "svg", "zip", "gif before png", "no pixels"]:
        assert cost(port, hostile[name]) == 0, name
    png, jpeg = hostile["wrong checksum"], saved(NOISE, "JPEG")
    for cut in [
        png[:8],
        png[:20],
        png[:33],
        jpeg[:3],
        jpeg[:100],
        jpeg[:2] + b"\xff\xd9" + jpeg[2:],
        b"RIFF\0\0\0\0WEBPVP8 ",
    ]:
        assert cost(port, cut) == 0
        with pytest.raises(OSError), Image.open(io.BytesIO(cut), formats=("PNG", "JPEG", "WEBP")) as image:
            image.load()


def test_an_endless_header_costs_the_most_and_is_not_read_to_its_end(port: int) -> None:
    png, jpeg = saved(NOISE, "PNG"), saved(NOISE, "JPEG")
    for data in [
        jpeg[:2] + b"\xff\xfe\0\2" * 30_000 + jpeg[2:],
        jpeg[:2] + b"\xff\xfe\0\0" * 30_000 + jpeg[2:],
        jpeg[:2] + b"\xff" * 30_000 + jpeg[2:],
        b"\xff\xd8\xff" + bytes(30_000) + jpeg[2:],
        png[:33] + chunk(b"prVt", b"") * 30_000 + png[33:],
        png[:33] + bytes(600_000) + png[33:],
    ]:
        pixels, reads = send(port, "/pixels", data)[1].split()
        assert float(pixels) == 25e6
        assert int(reads) <= 4002


def test_of_two_sizes_the_larger_counts(port: int) -> None:
    """Pillow uses the last size before a PNG's data, also of an animation frame; and a JPEG's last frame header."""
    solid = Image.new("RGB", (WIDTH, HEIGHT))
    png, jpeg = saved(solid, "PNG"), saved(solid, "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    length = 2 + int.from_bytes(jpeg[frame + 2 : frame + 4], "big")
    small = bytearray(jpeg[frame : frame + length])
    small[5:9] = bytes([0, 1, 0, 1])
    frame_data = chunk(b"fdAT", bytes(4) + zlib.compress(bytes(10)))
    for data in [
        png[:8] + header(1, 1) + png[8:],
        png[:33] + header(1, 1) + png[33:],
        png[:33] + frame_data + header(1, 1) + png[33:],
        jpeg[:frame] + small + jpeg[frame:],
        jpeg[: frame + length] + small + jpeg[frame + length :],
    ]:
        assert cost(port, data) >= WIDTH * HEIGHT / 4


def test_a_promised_canvas_counts_although_no_pixel_follows(port: int) -> None:
    assert cost(port, hostile_images()["canvas"]) == 25e6
    assert cost(port, hostile_images()["bomb by header"]) == 25e6


def test_costly_requests_take_turns_and_cheap_ones_do_not_wait(port: int) -> None:
    StandIn.most.clear()
    addresses = [f"127.0.0.{number}" for number in range(2, 8)]
    with ThreadPoolExecutor(12) as pool:
        costly = [pool.submit(work, port, COSTLY, 0.2, address) for address in addresses]
        cheap = [pool.submit(work, port, CHEAP, 0.2, address) for address in addresses]
    assert {future.result()[0] for future in costly + cheap} == {200}
    assert StandIn.most["costly"] == 1 and StandIn.most["cheap"] > 1
    assert max(future.result()[2] for future in cheap) < 0.2 * 3 < max(future.result()[2] for future in costly)


def test_a_caller_with_many_costly_requests_gets_no_larger_share(port: int) -> None:
    over = threading.Event()

    def send_again_and_again() -> None:
        while not over.is_set():
            work(port, COSTLY, 0.02, "127.0.0.2")

    with ThreadPoolExecutor(20) as pool:
        greedy = [pool.submit(send_again_and_again) for _ in range(20)]
        time.sleep(0.3)
        StandIn.done.clear()
        answered = [work(port, COSTLY, 0.02, "127.0.0.3")[0] for _ in range(3)]
        turns = StandIn.done["costly"]
        over.set()
    assert [future.result() for future in greedy] == [None] * 20
    # Every second slot, so 6 slots in total, up to 22 on a busy machine; without fairness every 21st, so 63.
    assert answered == [200] * 3 and turns <= 30


def test_a_costly_request_that_gets_no_turn_is_refused(port: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work, port, COSTLY, WAIT + 0.7, "127.0.0.2")
        time.sleep(0.2)
        status, text, seconds = work(port, COSTLY, 0, "127.0.0.3")
    assert running.result()[0] == 200
    assert status == 429 and "smaller" in text and WAIT <= seconds < WAIT + 0.5


def test_the_turn_of_a_client_that_left_is_kept_while_its_image_is_decoded(port: int) -> None:
    seconds = 1.0  # decoding time of 40 megapixels
    gone = http.client.HTTPConnection("127.0.0.1", port)
    gone.request("GET", f"/work?pixels=40000000&seconds={seconds}")
    time.sleep(0.2)
    gone.close()
    status, _, waited = work(port, COSTLY, 0, "127.0.0.3")
    assert status == 200 and 0.7 * seconds < waited < 2 * seconds


def test_a_client_that_left_while_it_waited_leaves_no_turn_behind(port: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work, port, COSTLY, 0.5, "127.0.0.2")
        time.sleep(0.1)
        for _ in range(3):
            gone = http.client.HTTPConnection("127.0.0.1", port, source_address=("127.0.0.3", 0))
            gone.request("GET", f"/work?pixels={COSTLY}&seconds=2")
            time.sleep(0.1)
            gone.close()
        status, _, waited = work(port, COSTLY, 0, "127.0.0.3")
        assert running.result()[0] == 200
    assert status == 200 and waited < 0.6


def test_a_turn_is_free_again_after_an_error_page(port: int) -> None:
    assert send(port, "/gone")[:2] == (502, "no answer")
    assert work(port, COSTLY, 0)[2] < 0.3
    assert work(port, COSTLY, 3.5)[0] == 504
    assert work(port, COSTLY, 0)[2] < 0.3
