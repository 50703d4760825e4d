"""Command line of all stages: `python -m pipeline.<stage> [--params FILE] [--debug]`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.params import PARAMS_FILE, Params, load_params
from pipeline.shared.errors import TailorError, explain
from serving.shared.terminal import print

DVC_STAGE = "DVC_STAGE"  # environment variable with the stage's name, set by DVC for the command of a stage
POLL = 1.0  # seconds


def stage_main(run: Callable[[Params], Any], description: str, arguments: list[str] | None = None) -> int:
    """Parse the arguments, load the params, run the stage and print the summary line of its result; returns the exit code.

    For an error that the user can correct, prints one line to stderr (exit code 1, or 2 for misuse); the traceback only
    with --debug.
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
    # Pillow warns about irregular images, which are then either used or rejected with one line.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    end_with_dvc(name)
    try:
        result = run(load_params(options.params))
    except KeyboardInterrupt as interrupt:
        how = str(interrupt) or "the same command runs it again"
        print(f"{name}: interrupted; {how}", file=sys.stderr)
        return 130
    except (TailorError, OSError) as error:
        if options.debug:
            raise
        # Messages of training start with the stage's name; it is removed if this line has it already. In stage `seeds`
        # it is another.
        print(f"{name}: {explain(error).removeprefix(f'{name}: ')}", file=sys.stderr)
        return error.exit_code if isinstance(error, TailorError) else 1
    if os.environ.get("RANK", "0") == "0":  # under torchrun every process gets here, only rank 0 prints
        print(f"{name}: {result}")
    return 0


def end_with_dvc(name: str) -> None:
    """End this process when the DVC process that runs it as a stage has exited; does nothing without DVC or /proc.

    DVC does not forward SIGTERM and cannot forward SIGKILL. The stage would then train at the same time as the next
    `dvc repro`.
    """
    stage = f"{DVC_STAGE}={os.environ.get(DVC_STAGE)}".encode()
    if DVC_STAGE not in os.environ or not Path("/proc/self/environ").exists():
        return
    # Between DVC and this process there can be a shell and torchrun, which have the variable too and can outlive DVC.
    owner = os.getppid()
    while owner > 1 and stage in _read_process(owner, "environ").split(b"\0"):
        owner = int(_status_fields(owner)[1])
    threading.Thread(target=_end_after, args=(owner, name), daemon=True).start()


def _end_after(owner: int, name: str) -> None:
    """Wait until the process `owner` has exited, then end this process."""
    started = _status_fields(owner)[19]
    # If DVC exited before this call, during the imports, the parent is process 1 or the user's systemd. In a container,
    # process 1 can be DVC itself.
    command = _read_process(owner, "cmdline")
    if not ((owner == 1 and b"dvc" not in command) or command.endswith(b"systemd\0--user\0")):
        while (fields := _status_fields(owner))[0] not in "ZX" and fields[19] == started:
            time.sleep(POLL)
    with contextlib.suppress(OSError):  # the terminal or the pipe may be closed
        print(
            f"{name}: ends, because dvc (process {owner}) has exited; `dvc repro` resumes it",
            file=sys.stderr,
            flush=True,
        )
    os.kill(os.getpid(), signal.SIGTERM)


def _status_fields(process: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, ...; state X if the process does not exist."""
    # The name in parentheses can contain any character, also parentheses.
    text = _read_process(process, "stat").decode(errors="replace").rpartition(")")[2]
    return text.split() or ["X", "0", *["0"] * 18]


def _read_process(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""
