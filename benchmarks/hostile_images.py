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

from benchmarks.other_work import OtherWork, processor
from benchmarks.serving_releases import NETWORKS, TRIAL, release_of
from benchmarks.swaps import send_at_rate
from models.preprocess import preprocess
from serving.client.images import blank_image
from serving.gateway.config import read_gateway
from serving.gateway.nginx_process import GatewayProcess
from serving.server.triton_server import TritonServer
from serving.shared.ports import choose_ports

GOAL_SUCCEEDED, GOAL_P99 = 0.99, 5.0  # share of successful normal requests; p99 with hostile callers / p99 alone
HOSTILE = 8
RATE = 40.0  # normal requests per second
PATIENCE = 10.0  # timeout of the normal caller in seconds
SIDE, REST = 4000, 3000  # pixels per side: 16 and 9 megapixels, together the limit of 25 megapixels per request


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def costly_images(side: int) -> dict[str, bytes]:
    """Return encoded images of side x side pixels, by description."""
    solid = Image.new("RGB", (side, side), (200, 30, 60))
    noise = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    rough = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
    return {
        "PNG, one colour": encode(solid, "PNG"),
        "PNG, with alpha": encode(solid.convert("RGBA"), "PNG"),
        "PNG, rough": encode(rough, "PNG", compress_level=1),
        "WebP, one colour, lossless": encode(solid, "WEBP", lossless=True),
        "WebP, one colour": encode(solid, "WEBP"),
        "WebP, rough": encode(rough, "WEBP", method=0),
        "JPEG, one colour": encode(solid, "JPEG"),
        "JPEG, rough": encode(rough, "JPEG", quality=90),
        "JPEG, rough, progressive": encode(rough, "JPEG", quality=90, progressive=True),
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
    caller = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.hostile_images", "--send", gateway.http_url],
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
        output, _ = caller.communicate()
    finally:
        over.set()
        caller.kill()
    for thread in threads:
        thread.join()
    responses = {"quiet": [], "loaded": []}
    for due, latency, version in json.loads(output):
        if start <= due < end:
            responses["quiet" if due < middle else "loaded"].append((latency, version > 0))
    return responses, statuses


def report(responses: dict, statuses: Counter, others: OtherWork) -> tuple[str, bool]:
    """Return a Markdown table, and whether both goals were met."""
    rows, p99, share = [], {}, {}
    for kind, requests in responses.items():
        cuts = statistics.quantiles([1000 * latency for latency, _ in requests], n=100, method="inclusive")
        share[kind], p99[kind] = sum(answered for _, answered in requests) / len(requests), cuts[98]
        rows.append(f"| {kind} | {len(requests)} | {share[kind]:.1%} | {cuts[49]:.1f} | {cuts[98]:.1f} |")
    ratio = p99["loaded"] / p99["quiet"]
    lines = [
        "| normal requests | due | succeeded | p50 ms | p99 ms |",
        "|---|--:|--:|--:|--:|",
        *rows,
        "",
        f"Responses to the hostile callers by status: {dict(sorted(statuses.items()))}.",
        f"Normal requests that succeeded beside them: {share['loaded']:.1%} (goal ≥ {GOAL_SUCCEEDED:.0%}). "
        f"p99 beside them / alone: {others.ratio(f'{ratio:.1f}')} (goal ≤ {GOAL_P99:g}).",
    ]
    return "\n".join(lines), share["loaded"] >= GOAL_SUCCEEDED and ratio <= GOAL_P99


def main() -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile_images", description=summary)
    parser.add_argument("--seconds", type=float, default=20.0, help="alone, and beside them (default: %(default)g)")
    parser.add_argument("--network", choices=list(NETWORKS), default=TRIAL, help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("build/serving"), help="default: %(default)s")
    parser.add_argument("--no-table", action="store_true", help="without the table of decoding times")
    parser.add_argument("--send", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.send:
        return send_at_rate(options.send, [(blank_image(), 0.0)], RATE, PATIENCE)
    images = {name: costly_images(SIDE)[name] for name in costly_images(16)}
    print(f"{processor()}\n")
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
            responses, statuses = measure(running, infer_request(costliest), options.seconds)
            text, met = report(responses, statuses, others)
            print(text, flush=True)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
