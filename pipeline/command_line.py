"""The command line that all stages share: `python -m pipeline.<stage> [--params FILE] [--debug]`."""

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

DVC_STAGE = "DVC_STAGE"  # the variable in which DVC names the stage to the command that it starts
POLL = 1.0  # seconds


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
        # Training names its stage, which the stage `seeds` does not know otherwise.
        print(f"{name}: {explain(error).removeprefix(f'{name}: ')}", file=sys.stderr)
        return error.exit_code if isinstance(error, TailorError) else 1
    if os.environ.get("RANK", "0") == "0":  # under torchrun every process comes by here, one speaks
        print(f"{name}: {result}")
    return 0


def end_with_dvc(name: str) -> None:
    """End this process when the DVC process that runs it as a stage has exited; without DVC or /proc nothing happens.

    DVC passes no SIGTERM on and cannot pass on SIGKILL. The stage would train beside the next `dvc repro`.
    """
    stage = f"{DVC_STAGE}={os.environ.get(DVC_STAGE)}".encode()
    if DVC_STAGE not in os.environ or not Path("/proc/self/environ").exists():
        return
    # Between DVC and this process may be a shell and torchrun, which have the variable too and may outlive DVC.
    owner = os.getppid()
    while owner > 1 and stage in _read_process(owner, "environ").split(b"\0"):
        owner = int(_status_fields(owner)[1])
    threading.Thread(target=_end_after, args=(owner, name), daemon=True).start()


def _end_after(owner: int, name: str) -> None:
    """Wait until the process `owner` has exited, then end this one."""
    started = _status_fields(owner)[19]
    # A process of DVC that exited before this call, during the imports, left the stage to process 1 or the user's systemd.
    # In a container process 1 may be DVC itself.
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
    """The fields of /proc/PID/stat after the name: state, parent, ...; state X where there is no such process."""
    # The name in brackets may hold anything.
    text = _read_process(process, "stat").decode(errors="replace").rpartition(")")[2]
    return text.split() or ["X", "0", *["0"] * 18]


def _read_process(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""
