"""nginx with decoding.lua alone, in front of a fake of Triton."""

from __future__ import annotations

import collections
import http.client
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

from serving.gateway.config import Gateway
from serving.gateway.nginx_process import find_nginx
from serving.shared.ports import choose_ports
from tests.support.running_gateway import require_nginx

LUA = Path(__file__).parents[2] / "serving/gateway/lua"


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
        location /unreachable {{
            access_by_lua_block {{ require("decoding").enter(1e6) }}
            proxy_pass http://127.0.0.1:1;
        }}
    }}
}}
"""


WAIT = 2  # seconds


class FakeTriton(BaseHTTPRequestHandler):
    """Fake server: works for the seconds in a request's query, and counts concurrent requests by kind."""

    now: ClassVar[collections.Counter[str]] = collections.Counter()
    most: ClassVar[collections.Counter[str]] = collections.Counter()
    done: ClassVar[collections.Counter[str]] = collections.Counter()
    lock = threading.Lock()

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        kind = "costly" if float(query["pixels"][0]) > 200_000 else "cheap"
        with self.lock:
            self.now[kind] += 1
            self.most[kind] = max(self.most[kind], self.now[kind])
        time.sleep(float(query["seconds"][0]))
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


@contextmanager
def decoding_nginx(folder: Path) -> Iterator[int]:
    """Run nginx with decoding.lua in front of a fake of Triton; yields its port."""
    require_nginx()
    port = choose_ports("127.0.0.1", {"http": 0})["http"]
    fake = ThreadingHTTPServer(("127.0.0.1", 0), FakeTriton)
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    (folder / "nginx.conf").write_text(
        CONFIG.format(
            modules=Gateway().modules, folder=folder, lua=LUA, wait=WAIT, port=port, upstream=fake.server_port
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
        fake.shutdown()
        fake.server_close()


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
