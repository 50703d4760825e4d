"""Commands on a data set before anything is trained: `python -m pipeline.data check` and `pack`, also as `tailor-data`."""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from PIL import Image

from pipeline import data_report
from pipeline.data_check import Report, check
from pipeline.data_pack import pack
from pipeline.errors import StageError
from pipeline.params import PARAMS_FILE, Params, load_params
from pipeline.project import keep_out_of_git
from pipeline.stage import explain
from serving.terminal import Console, print

CHECK_OUTPUT = Path("artifacts/data_check")
PROGRAM = "python -m pipeline.data"  # what help and errors call it, unless whoever calls main says otherwise
UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}

CHECK_EXAMPLES = """examples:
  {program} check                           the data of params.yaml; figures to artifacts/data_check/
  {program} check --near 2                  only copies that look all but identical count as near duplicates
  {program} check --json | jq .list_hash    the hash to compare with a colleague's

Interrupted, it goes on where it was; run again, it reads only files that changed. Exit code 1 when `split` would refuse
the data, when images of two splits are duplicates or near duplicates, or when a known data set differs from what was
published. Too few test images are a warning."""
PACK_EXAMPLES = """examples:
  {program} pack data/packed                      shards of about 256 MiB
  {program} pack data/packed --shard-size 1G      fewer, larger ones
  {program} pack data/packed --shuffle 0          in random order: for data that training streams

Interrupted, it goes on after the last whole shard. It prints the lines for params.yaml that read the pack."""


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    """The command line; returns the exit code: 0 right, 1 something is wrong with the data, 2 misuse.

    program: the words that it was started by, for its help and its errors.
    """
    options = _parsers(program)[0].parse_args(arguments)
    # Pillow warns of oddities in an image that is then used, or refused in one line of our own.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    run: Callable[[Params, argparse.Namespace], int] = options.run
    try:
        return run(load_params(options.params), options)
    except KeyboardInterrupt:
        print(f"data {options.command}: interrupted; run it again to go on", file=sys.stderr)
        return 130
    except (StageError, OSError) as error:
        if options.debug:
            raise
        print(f"data {options.command}: {explain(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, StageError) else 1


def help_of(command: str, program: str = PROGRAM, width: int | None = None) -> str:
    """What `--help` prints of `check` or `pack`; width: columns, those of the terminal if not given."""
    return _parsers(program, width)[1][command].format_help()


def run_check(params: Params, options: argparse.Namespace) -> int:
    """Check the data set, show and write what was found. Git ignores its folder from then on."""
    if "://" not in params.data.location:
        keep_out_of_git(Path(params.data.location))
    journal = options.output.with_name(f".{options.output.name}.jsonl")
    report = check(params, journal, options.near, options.jobs, options.fresh)
    data_report.write(report, options.output)
    if options.json:
        print((options.output / "report.json").read_text(encoding="utf-8"), end="")
    else:
        data_report.show(report, Console())
        print(f"data check: {_conclusion(report, options.allow_duplicates)} → {options.output}")
    return 1 if report.verdict or (report.problems and not options.allow_duplicates) else 0


def _conclusion(report: Report, allowed: bool) -> str:
    if report.verdict:
        return "not right"
    if not report.problems:
        return "right"
    return (
        "right, but for the duplicates above, which --allow-duplicates accepts"
        if allowed
        else "not right, see the problem above; remove the copies, or accept them with --allow-duplicates"
    )


def run_pack(params: Params, options: argparse.Namespace) -> int:
    """Pack the data set and say how to read the pack."""
    packed = pack(params, options.output, options.shard_size, options.jobs, options.shuffle)
    keep_out_of_git(options.output)
    if options.json:
        print(json.dumps(packed.as_mapping(), indent=2, ensure_ascii=False))
    else:
        print(f"data pack: {packed}")
        print(packed.table())
    return 0


def _parsers(
    program: str, width: int | None = None
) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands by their names."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|pack")
    shown = {"program": program, "width": width}
    found = _command(commands, "check", run_check, "Is this data set what it should be?", CHECK_EXAMPLES, **shown)
    found.add_argument("--output", type=Path, default=CHECK_OUTPUT, help="folder of the report (default: %(default)s)")
    found.add_argument(
        "--near", type=_bits, default=4, metavar="BITS|off",
        help="bits of 64 in which the perceptual hashes of near duplicates may differ (default: %(default)s)",
    )  # fmt: skip
    found.add_argument(
        "--allow-duplicates", action="store_true",
        help="exit code 0 although duplicates or near duplicates lie in two splits; they are reported all the same",
    )  # fmt: skip
    found.add_argument("--fresh", action="store_true", help="read every image again")
    found.add_argument("--json", action="store_true", help="print report.json instead of tables")
    made = _command(commands, "pack", run_pack, "Many small files into a few Parquet shards.", PACK_EXAMPLES, **shown)
    made.add_argument("output", type=Path, help="folder to write; must not be there yet")
    made.add_argument(
        "--shard-size", type=_size, default=256 * 1024**2, metavar="BYTES", help="e.g. 64M or 1G (default: 256M)"
    )
    made.add_argument(
        "--json", action="store_true", help="print what was packed as JSON, with its section of params.yaml"
    )
    made.add_argument("--shuffle", type=_seed, metavar="SEED", help="random order (default: the source's order)")
    return parser, commands.choices


def _command(commands, name: str, run, description: str, examples: str, program: str, width: int | None):
    parser = commands.add_parser(
        name, help=description, description=description, epilog=examples.format(program=program),
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=width),
    )  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("--params", type=Path, default=PARAMS_FILE, help="the recipe (default: %(default)s)")
    parser.add_argument("--jobs", type=_jobs, metavar="N", help="images read at a time (default: by the cores)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _bits(text: str) -> int | None:
    if text == "off":
        return None
    if not text.isdecimal() or int(text) > 10:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 to 10, or off")
    return int(text)


def _jobs(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 to 1024")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 to {2**32 - 1}")
    return int(text)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected bytes such as 64M or 1G")
    return int(match[1]) * UNITS[match[2]]


if __name__ == "__main__":
    sys.exit(main())
