"""Latency of requests during a promotion (hot swap): `python -m benchmarks.swaps [--swaps 50] [--rate 40]`.

Serves an export, sends requests to its classifier at a steady rate over HTTP from a separate process, and promotes
release after release, each a new version with the same graph. Quiet stretches and swaps alternate, so that both see the
same machine load. Latency is measured from the scheduled start of a request, so that a stall also counts for the
requests that it delays. A swap is the whole of `tailor promote` (publishing, the rehearsal on a second server, loading,
golden requests) and the two seconds after it, in which Triton unloads old instances. A quiet stretch is as long as the
swap before it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.other_work import OtherWork, processor, quiet_ratio
from serving.client import Client
from serving.promotion.promotion import promote
from serving.repository.manifest import MANIFEST_NAME, load_golden, load_manifest
from serving.repository.writer import write_repository
from serving.server.triton_server import TritonServer
from serving.shared.errors import ServingError
from serving.transport.retries import Retries

GOAL = 2.0  # p99 during swaps / p99 without
UNLOADING = 2.0  # seconds after a promotion that still count as the swap
CONNECTIONS = 4  # of the caller, one thread each


@dataclass(frozen=True)
class Stretch:
    """A time span (seconds, monotonic clock) of kind `quiet` or `swap`."""

    kind: str
    start: float
    end: float


def send_at_rate(
    url: str, images: list[tuple[bytes, float]], rate: float, timeout: float = 30.0, retries: Retries | None = None
) -> int:
    """Send `rate` requests/s until EOF on standard input, then print [due, latency, version or 0] of each as JSON.

    images: image and strength of the request of each connection. A request due before the end that could not be sent
    within `timeout` seconds after it counts as failed.
    """
    ends: list[float] = []
    sent: list[tuple[float, float, int]] = []

    def send(number: int) -> None:
        due, step = time.monotonic() + number / rate, CONNECTIONS / rate
        image, strength = images[number % len(images)]
        with Client(url, timeout=timeout, retries=retries) as client:
            while not ends or due < ends[0]:
                time.sleep(max(0.0, due - time.monotonic()))
                version = 0
                try:
                    if not ends or time.monotonic() <= ends[0] + timeout:
                        version = client.predict([image], strength)[0].version
                except ServingError as error:
                    print(error, file=sys.stderr)
                sent.append((due, time.monotonic() - due, version))
                due += step

    threads = [threading.Thread(target=send, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    ends.append(time.monotonic())
    for thread in threads:
        thread.join()
    json.dump(sent, sys.stdout)
    return 0


def golden_images(export: Path) -> list[tuple[bytes, float]]:
    """Return image and strength of the golden requests of an export."""
    return [(golden.image_bytes(), golden.strength) for golden in load_golden(export)]


def new_release(export: Path, folder: Path, number: int) -> Path:
    """Copy an export as another release, with a different code revision in its manifest."""
    copy = shutil.copytree(export, folder / f"export-{number}")
    manifest = load_manifest(copy).model_copy(update={"code_revision": f"swap {number}"})
    (copy / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return copy


def measure(
    export: Path, swaps: int, rate: float, folder: Path
) -> tuple[list[Stretch], list[tuple[float, float, int]]]:
    """Return the quiet and swap stretches, and every request: due time, latency, version or 0."""
    root = write_repository(export, folder / "repository")
    stretches = []
    with TritonServer(root, http_port=0, grpc_port=0, metrics_port=0) as server:
        command = [sys.executable, "-m", "benchmarks.swaps", "--send", server.http_url, "--export", str(export)]
        # A separate session (scheduler autogroup): processes of the promotion do not share the caller's time slices.
        caller = subprocess.Popen(
            [*command, "--rate", str(rate)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        try:
            time.sleep(3)  # warm-up
            for number in range(swaps):
                release = new_release(export, folder, number)
                start = time.monotonic()
                promote(root, release)
                time.sleep(UNLOADING)
                end = time.monotonic()
                stretches.append(Stretch("swap", start, end))
                time.sleep(end - start)
                stretches.append(Stretch("quiet", end, time.monotonic()))
                shutil.rmtree(release)
            output, _ = caller.communicate()
        finally:
            caller.kill()
    return stretches, [tuple(row) for row in json.loads(output)]


def report(
    command: str, stretches: list[Stretch], requests: list[tuple[float, float, int]], others: float = 0.0
) -> tuple[str, bool]:
    """Return a Markdown table, and whether both goals were met: no failed request, p99 within GOAL.

    others: share of the cores that other work took.
    """
    during = {kind: [] for kind in ("quiet", "swap")}
    for due, latency, version in requests:
        for stretch in stretches:
            if stretch.start <= due < stretch.end:
                during[stretch.kind].append((latency * 1000, version))
    rows, p99 = [], {}
    for kind, responses in during.items():
        latencies = [latency for latency, _ in responses]
        cuts = statistics.quantiles(latencies, n=1000, method="inclusive")
        p99[kind] = cuts[989]
        failed = sum(version == 0 for _, version in responses)
        rows.append(
            f"| {kind} | {len(responses)} | {failed} | {cuts[499]:.1f} | {cuts[989]:.1f} | {cuts[998]:.1f} "
            f"| {max(latencies):.1f} |"
        )
    swaps = [stretch.end - stretch.start for stretch in stretches if stretch.kind == "swap"]
    failed = sum(version == 0 for _, _, version in requests)
    versions = len({version for _, _, version in requests} - {0})
    ratio = p99["swap"] / p99["quiet"]
    lines = [
        f"`{command}`",
        "",
        f"{processor()}; load average at the end {os.getloadavg()[0]:.2f}.",
        f"{len(swaps)} swaps of {statistics.median(swaps):.1f} s (median, with {UNLOADING:g} s of unloading after the "
        f"promotion), {versions} versions responded, "
        f"{len(requests)} requests, {failed} failed (goal 0).",
        f"p99 during swaps / p99 without: {quiet_ratio(f'{ratio:.2f}', others)} (goal ≤ {GOAL:g}).",
        "",
        "| stretch | requests | failed | p50 ms | p99 ms | p99.9 ms | max ms |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *rows,
    ]
    return "\n".join(lines), failed == 0 and ratio <= GOAL


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swaps", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--export", type=Path, default=Path("artifacts/export"), help="default: %(default)s")
    parser.add_argument("--swaps", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=40.0, help="requests/s, default: %(default)s")
    parser.add_argument("--send", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.send:
        return send_at_rate(options.send, golden_images(options.export), options.rate)
    with tempfile.TemporaryDirectory(prefix="tailor-swaps-") as folder:
        others = OtherWork()
        measured = measure(options.export.absolute(), options.swaps, options.rate, Path(folder))
    command = f"python -m benchmarks.swaps --swaps {options.swaps} --rate {options.rate:g}"
    text, met = report(command, *measured, others.share())
    print(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
