"""A reader who types the commands of a page into a project, one after another, and has several terminals."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from serving.shared.ports import choose_ports
from tests.support.project import Project

# What runs until it is told to end, the line by which one knows that it is ready, and the statuses that it may end with.
SERVICES = {
    "tailor serve": (r"^ready (\S+) (\S+)", (0,)),
    "tailor gateway": (r"^ready https://", (0,)),
    "tailor playground": (r"^playground http://", (0, 130)),
    "tailor schedule": (r"retrains at", (0, -signal.SIGTERM)),
}
ASKS = ("tailor predict", "tailor status", "tailor playground", "tailor loadtest")
PAGES_SERVER = "http://127.0.0.1:8000"
STARTS_WITHIN = 120.0  # seconds


@dataclass
class Terminal:
    """A service that runs in a terminal of its own; log: what it prints."""

    process: subprocess.Popen[bytes]
    log: Path
    ends_with: tuple[int, ...]


@dataclass
class Reader:
    """Types into `project`. altered: text of a command → what is typed instead, beside ports and addresses.

    Ports differ from the pages' as others may serve on this machine: those that listen take free ones, those that ask get
    the address of the server that was started last. folder: where the reader is, at first the project if not given.
    """

    project: Project
    altered: dict[str, str] = field(default_factory=dict)
    terminals: list[Terminal] = field(default_factory=list)
    addresses: tuple[str, str] | None = None
    folder: Path | None = None

    def type(self, command: str, expect: tuple[int, ...] = (0,)) -> str:
        """Run a command to its end, or start a service and wait until it is ready; returns what it prints."""
        if command.startswith("cd "):
            self.folder = (self.folder or self.project.root) / command.removeprefix("cd ")
            return ""
        service = next((name for name in SERVICES if command.startswith(name)), None)
        text = self.as_typed(command)
        if service:
            return self._start(text, *SERVICES[service])
        shell = ["bash", "-e", "-o", "pipefail", "-c", text]
        done = subprocess.run(
            shell, cwd=self.folder or self.project.root, env=self.project.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode in expect, f"{text} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def run(self, program: str) -> str:
        """Run a page's Python in the project, with the address of this run's server; returns what it prints."""
        assert self.addresses or PAGES_SERVER not in program, "no server was started before it on the page"
        text = program.replace(PAGES_SERVER, self.addresses[0] if self.addresses else "")
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=self.folder or self.project.root, env=self.project.environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\nended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def as_typed(self, command: str) -> str:
        """The command with ports and addresses of this run."""
        for text, instead in self.altered.items():
            command = command.replace(text, instead)
        if command.startswith("tailor serve"):
            command += " --quiet --http-port 0 --grpc-port 0 --metrics-port 0"
        elif command.startswith(ASKS):
            assert self.addresses, f"{command}: no server was started before it on the page"
            command += f" --url {self.addresses['grpc' in command]}"
        if command.startswith("tailor gateway"):
            assert self.addresses, f"{command}: no server was started before it on the page"
            free = choose_ports("127.0.0.1", {"http": 0, "grpc": 0})
            command = re.sub(r"--(http|grpc)-port \d+", lambda found: f"--{found[1]}-port {free[found[1]]}", command)
            triton = [address.partition("://")[2] for address in self.addresses]
            command += f" --upstream-http {triton[0]} --upstream-grpc {triton[1]}"
        if command.startswith("curl"):
            assert self.addresses, f"{command}: no server was started before it on the page"
            command = command.replace(PAGES_SERVER, self.addresses[0])
        if command.startswith(("tailor playground", "tailor schedule")):
            command += " --port 0"
        return command.replace("make ", "make -o install ")  # what runs the tests is installed

    def _start(self, text: str, ready: str, ends_with: tuple[int, ...]) -> str:
        log = self.project.root / f".terminal-{len(self.terminals)}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {text}"], cwd=self.folder or self.project.root, env=self.project.environment,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                preexec_fn=_hear_ctrl_c,
            )  # fmt: skip
        self.terminals.append(Terminal(process, log, ends_with))
        until = time.monotonic() + STARTS_WITHIN
        while not (found := re.search(ready, log.read_text(encoding="utf-8"), re.MULTILINE)):
            assert process.poll() is None and time.monotonic() < until, f"{text}\n{log.read_text(encoding='utf-8')}"
            time.sleep(0.05)
        if text.startswith("tailor serve"):
            self.addresses = found[1], found[2]
        return log.read_text(encoding="utf-8")

    def close(self) -> None:
        """End every service as one does, the last one first; each must end as it promises."""
        wrong = []
        for terminal in reversed(self.terminals):
            terminal.process.send_signal(signal.SIGINT if 130 in terminal.ends_with else signal.SIGTERM)
            status = terminal.process.wait(timeout=60)
            if status not in terminal.ends_with:
                wrong.append(f"{terminal.process.args} ended with {status}\n{terminal.log.read_text()[-2000:]}")
        self.terminals.clear()
        assert not wrong, "\n".join(wrong)


def _hear_ctrl_c() -> None:
    """Tests that were started in the background hand on a shell's wish to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
