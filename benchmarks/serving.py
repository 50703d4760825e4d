"""Throughput and latency of served models against ONNX Runtime and other servers: `python -m benchmarks.serving`.

In one run on the same cores, in turns, round by round: raw ONNX Runtime in a process, at the best batch and threads
that a search finds, against `student`; decoding and inference in a process against `classifier`; LitServe, BentoML, Ray
Serve and FastAPI on the same ONNX file against `student` over HTTP (--peers-python); and the cost of a request's prior.
A ratio is the median over the rounds, with the smallest and the largest; p50 and p99 are medians over turns. The load
generator (benchmarks.serving_load) shares the cores; the tables show its share, and that of other work during a turn.
With more than a tenth of other work no ratio is printed.

The models are exports of untrained networks, made by the pipeline's stages, in the repository that `tailor repository`
writes, on the Triton server that `tailor serve` starts. The result of each section is stored in --work, so an
interrupted run can be resumed, also with other --rounds; --fresh measures again.

  python -m benchmarks.serving --only limit-resnet32 --rounds 3
  python -m benchmarks.serving --peers-python build/peers/bin/python --output benchmarks/results/serving-cpu.md
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.other_work import MOST
from benchmarks.serving_load import LoadError
from benchmarks.serving_raw import PROVIDERS
from benchmarks.serving_releases import TRIAL
from benchmarks.serving_sections import Section, Settings, sections
from benchmarks.serving_tables import report
from serving.shared.atomic import write_file
from serving.shared.errors import ServingError


def select_sections(patterns: list[str] | None) -> list[Section]:
    """Return the sections that match the patterns. Raises ValueError naming a pattern without a match."""
    all_sections = sections()
    if not patterns:
        return [section for section in all_sections if section.network != TRIAL]
    for pattern in patterns:
        if not any(fnmatch(section.name, pattern) for section in all_sections):
            raise ValueError(
                f"{pattern!r} matches no section; expected {', '.join(section.name for section in all_sections)}"
            )
    return [section for section in all_sections if any(fnmatch(section.name, pattern) for pattern in patterns)]


def result_path(section: Section, settings: Settings) -> Path:
    """Return the path of a section's stored result."""
    return settings.work / "results" / f"{settings.device}-{section.name}.json"


def result_of(section: Section, settings: Settings, fresh: bool) -> dict[str, Any]:
    """Return a section's result: the stored one, or with `fresh` or without one, a new measurement, which is stored."""
    path = result_path(section, settings)
    if not fresh and path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        print(f"{section.name}: stored result of {stored['started']}; --fresh measures again", file=sys.stderr)
        return stored
    made_with = {"seconds": settings.seconds, "rounds": settings.rounds}
    started = time.strftime("%Y-%m-%d %H:%M")
    result = {"made_with": made_with, "started": started, **section.measure(settings)}
    if section.kind != "peer" or "turns" in result:  # a peer without turns is not installed; it may be later
        write_file(path, json.dumps(result, indent=1) + "\n")
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", metavar="SECTION",
        help=f"some sections, wildcards allowed: {', '.join(section.name for section in sections())}",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="length of a turn, for ResNet-50 twice that (default: 3)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--device", choices=list(PROVIDERS), default="cpu", help="where ONNX Runtime computes")
    parser.add_argument("--peers-python", type=Path, help="Python of the environment with the peers")
    parser.add_argument("--work", type=Path, default=Path("build/serving"), help="default: %(default)s")
    parser.add_argument(
        "--kept", action="store_true", help="measure nothing; print the tables of the results stored in --work"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again, also what is stored in --work")
    parser.add_argument(
        "--others", type=float, default=MOST, metavar="SHARE",
        help="largest share of the cores for other work at which a ratio is printed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    options = parser.parse_args(arguments)
    if not options.seconds > 0 or options.rounds < 1:
        parser.error("--seconds and --rounds: expected more than 0")
    if options.peers_python and not options.peers_python.is_file():
        parser.error(
            f"argument --peers-python: {options.peers_python}: no such file; give that environment's bin/python"
        )
    if options.device == "gpu":
        import onnxruntime

        if PROVIDERS["gpu"] not in onnxruntime.get_available_providers():
            parser.error("argument --device: this onnxruntime has no CUDA; pip install onnxruntime-gpu in its place")
    try:
        options.sections = select_sections(options.only)
    except ValueError as error:
        parser.error(f"argument --only: {error}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = parse(arguments)
    python = options.peers_python.absolute() if options.peers_python else None
    settings = Settings(options.work, options.seconds, options.rounds, options.device, python, options.others)
    settings.work.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.serving {shlex.join(sys.argv[1:] if arguments is None else arguments)}".strip()
    results, failed = {}, False
    for section in options.sections:
        if options.kept and not result_path(section, settings).is_file():
            continue
        try:
            results[section] = result_of(section, settings, options.fresh)
        except (ServingError, LoadError) as error:
            print(f"{section.name}: {error}", file=sys.stderr)
            failed = True
    if not results:
        print("benchmarks.serving: no section has a result", file=sys.stderr)
        return 1
    text = report(command, settings, results)
    if missing := [section.name for section in options.sections if section not in results]:
        text += f"\n\nNot measured yet: `python -m benchmarks.serving --only {' '.join(missing)}`."
    print(text)
    if options.output:
        write_file(options.output, text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
