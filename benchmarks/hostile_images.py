"""Effect of callers with expensive images on other callers: `python -m benchmarks.hostile_images [--seconds 20]`.

Serves an untrained network behind the gateway. A normal caller sends small images at a steady rate, first alone, then
beside eight hostile callers with different loopback addresses (127.0.0.2 to 127.0.0.9), which send the images that take
longest to decode, each as fast as responses arrive. Latency is measured from the scheduled start of a request, so that
a stall also counts for the requests that it delays. Also prints a table of decoding times of 16-megapixel images.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.other_work import OtherWork
from benchmarks.serving_releases import NETWORKS, TRIAL, release_of
from models.preprocess import preprocess
from serving.client import Client
from serving.client.images import blank_image
from serving.gateway.config import read_gateway
from serving.gateway.nginx_process import GatewayProcess
from serving.server.triton_server import TritonServer
from serving.shared.errors import ServingError
from serving.shared.ports import choose_ports

GOAL_ANSWERED, GOAL_P99 = 0.99, 5.0  # share of successful normal requests; p99 with hostile callers / p99 alone
HOSTILE = 8
RATE = 40.0  # normal requests per second
CONNECTIONS = 4  # of the normal caller, one thread each
PATIENCE = 10.0  # timeout of the normal caller in seconds
SIDE, REST = 4000, 3000  # pixels per side: 16 and 9 megapixels, together the limit of 25 megapixels per request


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def costly_images(side: int) -> dict[str, bytes]:
    """Return encoded images of side x side pixels, by description."""
    solid = Image.new("RGB", (side, side), (200, 30, 60))
    noise = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    rough = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
    return {
        "PNG, one colour": saved(solid, "PNG"),
        "PNG, with alpha": saved(solid.convert("RGBA"), "PNG"),
        "PNG, rough": saved(rough, "PNG", compress_level=1),
        "WebP, one colour, lossless": saved(solid, "WEBP", lossless=True),
        "WebP, one colour": saved(solid, "WEBP"),
        "WebP, rough": saved(rough, "WEBP", method=0),
        "JPEG, one colour": saved(solid, "JPEG"),
        "JPEG, rough": saved(rough, "JPEG", quality=90),
        "JPEG, rough, progressive": saved(rough, "JPEG", quality=90, progressive=True),
    }


def decoding_seconds(data: bytes, size: int, resize_to: int, **options: int) -> float:
    """Return the CPU seconds of preprocessing, the minimum of three runs."""
    times = []
    for _ in range(3):
        started = time.process_time()
        preprocess(data, size, resize_to, **options)
        times.append(time.process_time() - started)
    return min(times)


def cost_table(images: dict[str, bytes]) -> str:
    """Markdown table of the preprocessing time of each image, for a network of 224 pixels."""
    rows = ["| image | bytes | whole, ms | served, ms |", "|---|--:|--:|--:|"]
    for name, data in images.items():
        whole, served = (1000 * decoding_seconds(data, 224, 256, **options) for options in ({"room": 0}, {}))
        rows.append(f"| {name} | {len(data):,} | {whole:.0f} | {served:.0f} |")
    return "\n".join(rows)


def infer_request(images: list[bytes]) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of one HTTP request to `classifier`."""
    raw = b"".join(struct.pack("<I", len(image)) + image for image in images)
    entry = {"name": "image", "datatype": "BYTES", "shape": [len(images), 1]}
    head = json.dumps({"inputs": [entry | {"parameters": {"binary_data_size": len(raw)}}]}).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head))}


def ask(url: str, rate: float) -> int:
    """Send `rate` requests/s until EOF on standard input, then print [due, latency, success] of each as JSON.

    A request due before the end that could not be sent within PATIENCE seconds after it counts as failed.
    """
    ends, asked = [], []

    def asker(number: int) -> None:
        due, step, image = time.monotonic() + number / rate, CONNECTIONS / rate, blank_image()
        with Client(url, timeout=PATIENCE) as client:
            while not ends or due < ends[0]:
                time.sleep(max(0.0, due - time.monotonic()))
                try:
                    late = ends and time.monotonic() > ends[0] + PATIENCE
                    answered = not late and bool(client.predict([image], 0.0))
                except ServingError as error:
                    print(error, file=sys.stderr)
                    answered = False
                asked.append((due, time.monotonic() - due, answered))
                due += step

    threads = [threading.Thread(target=asker, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    ends.append(time.monotonic())
    for thread in threads:
        thread.join()
    json.dump(asked, sys.stdout)
    return 0


def attack(
    port: int, address: str, request: tuple[bytes, dict[str, str]], over: threading.Event, statuses: Counter
) -> None:
    """Send one request repeatedly from a source address, and count the responses by status."""
    while not over.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=(address, 0))
        try:
            while not over.is_set():
                connection.request("POST", "/v2/models/classifier/infer", *request)
                answer = connection.getresponse()
                answer.read()
                statuses[answer.status] += 1
        except (OSError, http.client.HTTPException):
            statuses[0] += 1
        finally:
            connection.close()


def measure(gateway: GatewayProcess, request: tuple[bytes, dict[str, str]], seconds: float) -> tuple[dict, Counter]:
    """Return latency (s) and success of the normal requests, quiet and loaded, and the hostile responses by status."""
    asker = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.hostile_images", "--ask", gateway.http_url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    over, statuses = threading.Event(), Counter()
    try:
        time.sleep(3)  # warm-up
        start = time.monotonic()
        time.sleep(seconds)
        middle = time.monotonic()
        addresses = [f"127.0.0.{number + 2}" for number in range(HOSTILE)]
        threads = [
            threading.Thread(target=attack, args=(gateway.gateway.http_port, address, request, over, statuses))
            for address in addresses
        ]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        end = time.monotonic()
        output, _ = asker.communicate()
    finally:
        over.set()
        asker.kill()
    for thread in threads:
        thread.join()
    found = {"quiet": [], "loaded": []}
    for due, latency, answered in json.loads(output):
        if start <= due < end:
            found["quiet" if due < middle else "loaded"].append((latency, answered))
    return found, statuses


def report(found: dict, statuses: Counter, others: OtherWork) -> tuple[str, bool]:
    """Return a Markdown table, and whether both goals were met."""
    rows, p99, share = [], {}, {}
    for kind, requests in found.items():
        cuts = statistics.quantiles([1000 * latency for latency, _ in requests], n=100, method="inclusive")
        share[kind], p99[kind] = sum(answered for _, answered in requests) / len(requests), cuts[98]
        rows.append(f"| {kind} | {len(requests)} | {share[kind]:.1%} | {cuts[49]:.1f} | {cuts[98]:.1f} |")
    ratio = p99["loaded"] / p99["quiet"]
    lines = [
        "| good requests | due | answered | p50 ms | p99 ms |",
        "|---|--:|--:|--:|--:|",
        *rows,
        "",
        f"Hostile callers' answers by status: {dict(sorted(statuses.items()))}.",
        f"Answered beside them: {share['loaded']:.1%} (goal ≥ {GOAL_ANSWERED:.0%}). "
        f"p99 beside them / alone: {others.ratio(f'{ratio:.1f}')} (goal ≤ {GOAL_P99:g}).",
    ]
    return "\n".join(lines), share["loaded"] >= GOAL_ANSWERED and ratio <= GOAL_P99


def main() -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile_images", description=summary)
    parser.add_argument("--seconds", type=float, default=20.0, help="alone, and beside them (default: %(default)g)")
    parser.add_argument("--network", choices=list(NETWORKS), default=TRIAL, help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("build/serving"), help="default: %(default)s")
    parser.add_argument("--no-table", action="store_true", help="without the table of what decoding costs")
    parser.add_argument("--ask", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        return ask(options.ask, RATE)
    images = {name: costly_images(SIDE)[name] for name in costly_images(16)}
    if not options.no_table:
        print(cost_table(images), end="\n\n")
    release = release_of(options.network, options.work)
    # A solid lossless WebP has 700 bytes, so sending it costs the caller nothing.
    costliest = [images["WebP, one colour, lossless"], costly_images(REST)["WebP, one colour, lossless"]]
    ports = choose_ports("127.0.0.1", {"http": 0, "grpc": 0})
    with TritonServer(release.repository, http_port=0, grpc_port=0, metrics_port=0) as server:
        gateway = read_gateway(
            http_port=ports["http"],
            grpc_port=ports["grpc"],
            upstream_http=server.http_url.removeprefix("http://"),
            upstream_grpc=server.grpc_url.removeprefix("grpc://"),
        )
        with GatewayProcess(gateway) as running:
            others = OtherWork()
            found, statuses = measure(running, infer_request(costliest), options.seconds)
            text, met = report(found, statuses, others)
            print(text, flush=True)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
