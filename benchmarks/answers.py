"""Cost of the extra parts of an answer for ResNet-32 at 32 pixels: `python -m benchmarks.answers [--rounds 5]`.

Two Triton servers take turns, each as `tailor serve` starts it: one with a release of today's answers, one whose release has a
temperature and defaults for prediction set, decision by costs and ask, and unknown. The requests have one JPEG file each. The
last side requests the same parts with inputs. A ratio is of one round, against the first side: of the images per second, and
of the CPU time per image of all processes of the server, which other work on the machine disturbs less. Median, smallest and
largest of the rounds. The load generator shares the cores.
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
from serving.client.extras import Extras
from serving.client.requests import classifier_call
from serving.repository.manifest import load_manifest
from serving.repository.model_config import default_outputs
from serving.repository.writer import write_repository
from serving.server.triton_server import TritonServer

IMAGES = 2000  # validation images of the release
PARTS = {
    "prediction set": Extras(coverage=0.9),
    "decision": Extras(ask=0.2),
    "unknown": Extras(false_alarms=0.05),
    "all": Extras(coverage=0.9, ask=0.2, false_alarms=0.05),
}


def with_defaults(export: Path, folder: Path) -> Path:
    """Write a copy of an export whose manifest has a temperature and a default for each part."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(export, folder)
    path, random = folder / "manifest.json", np.random.default_rng(0)
    content = json.loads(path.read_text(encoding="utf-8"))
    classes = len(content["classes"])
    content["calibration"] = {"temperature": 1.0, "images": IMAGES, "effective": float(IMAGES)}
    scores = random.uniform(size=(classes, IMAGES // classes)).round(4).tolist()
    content["sets"] = {"scores": scores, "interpolation": 0.5, "coverage": 0.9}
    content["unknown"] = {
        "scores": {g: random.normal(size=IMAGES // 3).tolist() for g in GROUPS},
        "false_alarms": 0.05,
    }
    content["decision"] = {"costs": random.uniform(0.5, 2, classes).tolist(), "ask": 0.2}
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def cpu_seconds(server: TritonServer) -> float:
    """CPU time of the server and of its inference processes so far."""
    assert server.process_id is not None
    process = psutil.Process(server.process_id)
    return sum(sum(each.cpu_times()[:2]) for each in (process, *process.children(recursive=True)))


@dataclasses.dataclass(frozen=True)
class Side:
    """A server and the load on it."""

    server: TritonServer
    load: Load

    def turn(self, seconds: float) -> tuple[float, float]:
        """Images per second, and CPU time of the server per image in µs."""
        before, sent = cpu_seconds(self.server), serving_load.WARM_UP * seconds
        result: TurnResult = serving_load.run(self.load, seconds)
        images = result.rate * (seconds + sent)
        return result.rate, (cpu_seconds(self.server) - before) / images * 1e6


def load_on(server: TritonServer, release: Release, extras: Extras | None, defaults: list[str]) -> Load:
    """A load on `classifier`: one JPEG file per request, under the prior `train`."""
    row, inputs = np.array([b"train"], dtype=np.object_), {} if extras is None else extras.inputs(None)
    photos = itertools.islice(itertools.cycle(release.photos), 96)
    calls = [classifier_call([photo], "prior", row, None, inputs, defaults) for photo in photos]
    return Load(port_of(server.http_url), [as_http(call) for call in calls], 1, release.network.users)


def measured(options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Images per second and CPU time per image of each side, a pair for each round."""
    release = release_of("resnet32", options.work)
    export = with_defaults(release.graph.parent, options.work.absolute() / "resnet32-answers")
    repository = write_repository(export, options.work.absolute() / "resnet32-answers-repository")
    start = functools.partial(TritonServer, http_port=0, grpc_port=0, metrics_port=0)
    with start(release.repository) as plain, start(repository) as full:
        names = default_outputs(load_manifest(export))
        sides = {
            "none": Side(plain, load_on(plain, release, None, [])),
            "all, defaults of the release": Side(full, load_on(full, release, None, names)),
        }
        sides |= {
            f"{name}, requested": Side(full, load_on(full, release, extras, names)) for name, extras in PARTS.items()
        }
        for side in sides.values():
            side.turn(options.seconds / 2)
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, side in sides.items():
                turns[name].append(side.turn(options.seconds))
                print(f"{name}: {turns[name][-1][0]:,.0f} images/s, {turns[name][-1][1]:.0f} µs", file=sys.stderr)
    return turns


def main(arguments: list[str] | None = None) -> int:
    """Run the measurement and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answers", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a turn (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/serving"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    others = OtherWork()
    turns = measured(options)
    first = turns["none"]
    print(f"`python -m benchmarks.answers {shlex.join(arguments or sys.argv[1:])}`\n")
    print(f"{processor()}; load average {load_average()}; other work took {others.share():.0%} of the cores.\n")
    print("| parts of an answer | images/s | ratio | CPU time, µs an image | ratio |\n|---|--:|--:|--:|--:|")
    for name, pairs in turns.items():
        cells = []
        for column, text in enumerate(("{:,.0f}", "{:.0f}")):
            cells.append(text.format(statistics.median(pair[column] for pair in pairs)))
            ratios = [pair[column] / base[column] for pair, base in zip(pairs, first, strict=True)]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
