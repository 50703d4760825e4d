"""The served models against the limit and against other servers: `python -m benchmarks.serving [--peers-python PYTHON]`.

In one run on the same cores, in turns, round by round: raw ONNX Runtime in a process, at the best batch and threads that the
run itself finds, against `student`; decoding and inference in a process against `classifier`; LitServe, BentoML, Ray Serve
and FastAPI on the same ONNX file against `student` over HTTP. And what a request's prior costs. A
ratio is the median over the rounds, beside the smallest and the largest; p50 and p99 are medians of the turns'. The load
generator (benchmarks.serving_load) shares the cores; its part of them is in the tables, and what other work took during a
turn. Where that was more than a tenth, no ratio is printed.

The models are exports of untrained networks, made by the pipeline's stages, in the repository that `tailor repository`
writes, on the Triton server that `tailor serve` starts. Each section's result is kept in --work, so that a run may be cut
and gone on with, in parts with other --rounds too; --fresh measures again.

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
from benchmarks.serving_sections import Given, Section, sections
from benchmarks.serving_tables import report
from serving.shared.atomic import write_file
from serving.shared.errors import ServingError


def chosen(patterns: list[str] | None) -> list[Section]:
    """The sections that are asked for. Raises ValueError naming a pattern that is none's."""
    known = sections()
    if not patterns:
        return [section for section in known if section.network != TRIAL]
    for pattern in patterns:
        if not any(fnmatch(section.name, pattern) for section in known):
            raise ValueError(f"{pattern!r} is no section; expected {', '.join(section.name for section in known)}")
    return [section for section in known if any(fnmatch(section.name, pattern) for pattern in patterns)]


def kept_at(section: Section, given: Given) -> Path:
    """Where a section's result is kept."""
    return given.work / "results" / f"{given.device}-{section.name}.json"


def result_of(section: Section, given: Given, fresh: bool) -> dict[str, Any]:
    """A section's result: the one that is kept, unless `fresh`, else measured now and kept."""
    path = kept_at(section, given)
    if not fresh and path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        print(f"{section.name}: kept from {kept['started']}; --fresh measures again", file=sys.stderr)
        return kept
    made_with = {"seconds": given.seconds, "rounds": given.rounds}
    started = time.strftime("%Y-%m-%d %H:%M")
    found = {"made_with": made_with, "started": started, **section.measure(given)}
    if section.kind != "peer" or "turns" in found:  # a peer that is not installed may be later
        write_file(path, json.dumps(found, indent=1) + "\n")
    return found


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
        "--seconds", type=float, default=3.0, help="of a turn; ResNet-50's take twice as long (default: 3)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--device", choices=list(PROVIDERS), default="cpu", help="where ONNX Runtime computes")
    parser.add_argument("--peers-python", type=Path, help="Python of the environment that has the peers")
    parser.add_argument("--work", type=Path, default=Path("build/serving"), help="default: %(default)s")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the tables of what is kept in --work")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept in --work")
    parser.add_argument(
        "--others", type=float, default=MOST, metavar="SHARE",
        help="of the cores that other work may take for a ratio to be printed (default: %(default)s)",
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
        options.sections = chosen(options.only)
    except ValueError as error:
        parser.error(f"argument --only: {error}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    python = options.peers_python.absolute() if options.peers_python else None
    given = Given(options.work, options.seconds, options.rounds, options.device, python, options.others)
    given.work.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.serving {shlex.join(sys.argv[1:] if arguments is None else arguments)}".strip()
    found, failed = {}, False
    for section in options.sections:
        if options.kept and not kept_at(section, given).is_file():
            continue
        try:
            found[section] = result_of(section, given, options.fresh)
        except (ServingError, LoadError) as error:
            print(f"{section.name}: {error}", file=sys.stderr)
            failed = True
    if not found:
        print("benchmarks.serving: no section has a result", file=sys.stderr)
        return 1
    text = report(command, given, found)
    if missing := [section.name for section in options.sections if section not in found]:
        text += f"\n\nNot measured yet: `python -m benchmarks.serving --only {' '.join(missing)}`."
    print(text)
    if options.output:
        write_file(options.output, text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
