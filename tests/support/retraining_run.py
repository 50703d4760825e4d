"""A retraining in a separate process, requests to the server during it, and the descendants of a process."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import psutil

from pipeline.flows.records import Outcome
from serving.client.sync_client import Client
from serving.server.triton_server import TritonServer
from serving.shared.errors import ServingError
from tests.serving.conftest import picture

WITHIN = 300.0  # timeout of a run in seconds, for a busy machine


def run_in(root: str, log: str, because: str) -> None:
    """Run `tailor retrain --json` in a forked process; stderr goes to `log`, stdout to `log`.json."""
    os.chdir(root)
    for number, path in ((1, f"{log}.json"), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    from pipeline.commands.app import main

    sys.exit(main(["retrain", "--because", because, "--json"]))


class Begun:
    """A retraining run in a separate process."""

    def __init__(self, context, root: Path, name: str = "run") -> None:
        self.log = root / f"{name}.log"
        self.log.unlink(missing_ok=True)
        self.process = context.Process(target=run_in, args=(str(root), str(self.log), "a test"))
        self.process.start()

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def await_line(self, line: str) -> None:
        deadline = time.monotonic() + WITHIN
        while line not in self.text():
            assert self.process.is_alive() and time.monotonic() < deadline, f"did not print {line!r}:\n{self.text()}"
            time.sleep(0.005)

    def kill_at(self, line: str, after: float = 0.0) -> None:
        """Send SIGKILL `after` seconds after the log contains `line`."""
        self.await_line(line)
        time.sleep(after)
        self.process.kill()
        self.process.join()

    def outcome(self) -> Outcome:
        self.process.join(WITHIN)
        answer = self.log.with_name(f"{self.log.name}.json").read_text()
        assert answer, self.text()
        outcome = Outcome(**json.loads(answer))  # stdout contains only the JSON, with every key
        assert self.process.exitcode == (1 if outcome.ending in ("failed", "busy") else 0), self.text()
        return outcome


class Asking(threading.Thread):
    """Thread that sends requests to the server without pause; records failures and the versions in order."""

    def __init__(self, server: TritonServer) -> None:
        super().__init__(daemon=True)
        self.url = server.grpc_url
        self.failures: list[str] = []
        self.versions: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        with Client(self.url, timeout=60) as client:
            while not self.over.wait(0.05):
                try:
                    self.versions.append(client.predict([picture(1)])[0].version)
                except ServingError as error:
                    self.failures.append(str(error))

    def __enter__(self) -> Asking:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.over.set()
        self.join()


def commands_below(process_id: int) -> list[str]:
    """Return the command lines of a process's descendants."""
    found = []
    for process in psutil.Process(process_id).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(" ".join(process.cmdline()))
    return found


def end_of_all(processes: list[psutil.Process]) -> None:
    """Wait until all processes have exited."""
    deadline = time.monotonic() + 60
    while lasting := [process for process in processes if lives(process)]:
        assert time.monotonic() < deadline, lasting
        time.sleep(0.1)


def lives(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
