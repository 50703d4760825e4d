"""Run the commands of a documentation page in a project, one after another; services run in the background."""

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

# Services: the line that reports readiness, and the allowed exit statuses.
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
    """A running service. log: file of its output."""

    process: subprocess.Popen[bytes]
    log: Path
    ends_with: tuple[int, ...]


@dataclass
class Reader:
    """Runs commands in `project`. altered: replacements of text in commands, besides ports and addresses.

    Ports differ from those of the pages, which may be in use on this machine: services get free ports, clients get the
    address of the server that was started last. folder: the working folder; default: the project.
    """

    project: Project
    altered: dict[str, str] = field(default_factory=dict)
    terminals: list[Terminal] = field(default_factory=list)
    addresses: tuple[str, str] | None = None
    folder: Path | None = None

    def type(self, command: str, expect: tuple[int, ...] = (0,)) -> str:
        """Run a command to its end, or start a service and wait until it is ready; return its output."""
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
        """Run a page's Python program in the project, with the address of this run's server; return its output."""
        assert self.addresses or PAGES_SERVER not in program, "no server was started before it on the page"
        text = program.replace(PAGES_SERVER, self.addresses[0] if self.addresses else "")
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=self.folder or self.project.root, env=self.project.environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\nended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def as_typed(self, command: str) -> str:
        """Return the command with the ports and addresses of this run."""
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
            command = re.sub(r"--(http|grpc)-port \d+", lambda match: f"--{match[1]}-port {free[match[1]]}", command)
            triton = [address.partition("://")[2] for address in self.addresses]
            command += f" --upstream-http {triton[0]} --upstream-grpc {triton[1]}"
        if command.startswith("curl"):
            assert self.addresses, f"{command}: no server was started before it on the page"
            command = command.replace(PAGES_SERVER, self.addresses[0])
        if command.startswith(("tailor playground", "tailor schedule")):
            command += " --port 0"
        return command.replace("make ", "make -o install ")  # the test environment is already installed

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
        while not (match := re.search(ready, log.read_text(encoding="utf-8"), re.MULTILINE)):
            assert process.poll() is None and time.monotonic() < until, f"{text}\n{log.read_text(encoding='utf-8')}"
            time.sleep(0.05)
        if text.startswith("tailor serve"):
            self.addresses = match[1], match[2]
        return log.read_text(encoding="utf-8")

    def close(self) -> None:
        """Stop every service with its signal, the last one first; assert the allowed exit statuses."""
        wrong = []
        for terminal in reversed(self.terminals):
            terminal.process.send_signal(signal.SIGINT if 130 in terminal.ends_with else signal.SIGTERM)
            status = terminal.process.wait(timeout=60)
            if status not in terminal.ends_with:
                wrong.append(f"{terminal.process.args} ended with {status}\n{terminal.log.read_text()[-2000:]}")
        self.terminals.clear()
        assert not wrong, "\n".join(wrong)


def _hear_ctrl_c() -> None:
    """Reset SIGINT: tests started in the background inherit from the shell that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
