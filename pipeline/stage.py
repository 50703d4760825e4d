"""The command line that all stages share: `python -m pipeline.<stage> [--params FILE] [--debug]`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.errors import DataProblems, StageError
from pipeline.params import PARAMS_FILE, Params, load_params
from serving.terminal import print


def stage_main(run: Callable[[Params], Any], description: str, arguments: list[str] | None = None) -> int:
    """Parse the arguments, load the params, run the stage, print its result's summary line; returns the exit code.

    One line on stderr for an error the user can act on (exit 1, or 2 for misuse); the traceback only with --debug.
    """
    name = run.__module__.rpartition(".")[2] if run.__module__ != "__main__" else Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(
        prog=f"python -m pipeline.{name}",
        description=description,
        epilog=f"example: python -m pipeline.{name} --params params.yaml    (`dvc repro {name}` runs it when needed)",
    )
    parser.add_argument("--params", type=Path, default=PARAMS_FILE, help="the recipe (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    # Pillow warns of oddities in an image that is then used, or refused in one line of our own.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        result = run(load_params(options.params))
    except KeyboardInterrupt as interrupt:
        how = str(interrupt) or "the same command runs it again"
        print(f"{name}: interrupted; {how}", file=sys.stderr)
        return 130
    except (StageError, OSError) as error:
        if options.debug:
            raise
        print(f"{name}: {explain(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, StageError) else 1
    if os.environ.get("RANK", "0") == "0":  # under torchrun every process comes by here, one speaks
        print(f"{name}: {result}")
    return 0


def explain(error: Exception) -> str:
    """An error in one line, DataProblems in a line for each problem; an operating-system error with its file and cause."""
    if isinstance(error, DataProblems):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = error.filename if error.filename else "a file of the stage"
        return f"{where}: {error.strerror}"
    return " ".join(str(error).split())
