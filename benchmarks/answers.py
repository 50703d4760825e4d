"""Cost of the extra parts of an answer for ResNet-32 at 32 pixels: `python -m benchmarks.answers [--rounds 20]`.

Two Triton servers take turns, each as `tailor serve` starts it: one with a release of today's answers, one whose release has a
temperature and defaults for prediction set, decision by costs and ask, and unknown. The requests have one JPEG file each. The
last side requests the same parts with inputs. A ratio is of one round, against the first side: of the images per second, and
of the CPU time per image of the server (Triton) and of its inference processes (Python), which other work on the machine
disturbs less. Median and quartiles of the rounds. The load generator shares the cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import shlex
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import psutil

from benchmarks import serving_load
from benchmarks.other_work import OtherWork, load_average, processor
from benchmarks.serving_load import Load, TurnResult
from benchmarks.serving_releases import Release, release_of
from benchmarks.serving_sections import as_http, port_of
from models.prior import GROUPS
from pipeline.answers.prediction_sets import INTERPOLATION
from serving.client.extras import Extras
from serving.client.requests import image_call
from serving.repository.manifest import load_manifest
from serving.repository.model_config import default_outputs
from serving.repository.writer import write_repository
from serving.server.triton_server import TritonServer

IMAGES = 2000  # validation images of the release
ALL = Extras(coverage=0.9, ask=0.2, false_alarms=0.05)
Turn = tuple[
    float, float, float
]  # images per second; CPU time per image in µs, of Triton and of the inference processes


def with_defaults(export: Path, folder: Path) -> Path:
    """Write a copy of an export whose manifest has a temperature and a default for each part."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(export, folder)
    path, random = folder / "manifest.json", np.random.default_rng(0)
    content = json.loads(path.read_text(encoding="utf-8"))
    classes = len(content["classes"])
    content["calibration"] = {"temperature": 1.0, "images": IMAGES, "effective": float(IMAGES)}
    scores = random.uniform(size=(classes, IMAGES // classes)).round(4).tolist()
    content["sets"] = {"scores": scores, "interpolation": INTERPOLATION, "coverage": 0.9}
    content["unknown"] = {
        "scores": {g: random.normal(size=IMAGES // 3).tolist() for g in GROUPS},
        "false_alarms": 0.05,
    }
    content["decision"] = {"costs": random.uniform(0.5, 2, classes).tolist(), "ask": 0.2}
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def cpu_seconds(server: TritonServer) -> tuple[float, float]:
    """CPU time of the server, and of its inference processes, so far."""
    assert server.process_id is not None
    process = psutil.Process(server.process_id)
    own = sum(process.cpu_times()[:2])
    return own, sum(sum(each.cpu_times()[:2]) for each in process.children(recursive=True))


@dataclasses.dataclass(frozen=True)
class Side:
    """A server and the load on it."""

    server: TritonServer
    load: Load

    def turn(self, seconds: float) -> Turn:
        """Send requests for `seconds` after a warm-up."""
        before = cpu_seconds(self.server)
        result: TurnResult = serving_load.run(self.load, seconds)
        own, inference = (
            (now - then) / result.images * 1e6 for now, then in zip(cpu_seconds(self.server), before, strict=True)
        )
        return result.rate, own, inference


def load_on(server: TritonServer, release: Release, extras: Extras | None, defaults: list[str]) -> Load:
    """A load on `classifier`: one JPEG file per request, under the prior `train`."""
    row, inputs = np.array([b"train"], dtype=np.object_), {} if extras is None else extras.inputs(None)
    photos = itertools.islice(itertools.cycle(release.photos), 96)
    calls = [image_call([photo], "prior", row, None, inputs, defaults, packed=True) for photo in photos]
    return Load(port_of(server.http_url), [as_http(call) for call in calls], 1, release.network.users)


def measured(options: argparse.Namespace) -> dict[str, list[Turn]]:
    """The turns of each side, one for each round."""
    release = release_of("resnet32", options.work)
    export = with_defaults(release.graph.parent, options.work.absolute() / "resnet32-answers")
    repository = write_repository(export, options.work.absolute() / "resnet32-answers-repository")
    start = functools.partial(TritonServer, http_port=0, grpc_port=0, metrics_port=0)
    with start(release.repository) as plain, start(repository) as full:
        names = default_outputs(load_manifest(export))
        sides = {
            "none": Side(plain, load_on(plain, release, None, [])),
            "all, defaults of the release": Side(full, load_on(full, release, None, names)),
            "all, requested": Side(full, load_on(full, release, ALL, names)),
        }
        for side in sides.values():
            side.turn(options.seconds / 2)
        turns: dict[str, list[Turn]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, side in sides.items():
                turns[name].append(side.turn(options.seconds))
                print(name, *(f"{value:,.0f}" for value in turns[name][-1]), file=sys.stderr)
    return turns


def quartiles(ratios: list[float]) -> str:
    """Median, and first and third quartile."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main(arguments: list[str] | None = None) -> int:
    """Run the measurement and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answers", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="turns of each side (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/serving"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    others = OtherWork()
    turns = measured(options)
    first = turns["none"]
    print(f"`python -m benchmarks.answers {shlex.join(arguments or sys.argv[1:])}`\n")
    print(f"{processor()}; load average {load_average()}; other work took {others.share():.0%} of the cores.\n")
    print("| parts of an answer | images/s | ratio | CPU time, µs an image: Triton | inference | ratio of the sum |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, each in turns.items():
        rate, own, inference = (f"{statistics.median(turn[column] for turn in each):,.0f}" for column in range(3))
        rates = quartiles([turn[0] / base[0] for turn, base in zip(each, first, strict=True)])
        times = quartiles([sum(turn[1:]) / sum(base[1:]) for turn, base in zip(each, first, strict=True)])
        print(f"| {name} | {rate} | {rates} | {own} | {inference} | {times} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
