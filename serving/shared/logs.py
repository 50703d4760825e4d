"""Log of the server and its inference processes: last lines for error messages, a rotated log file, a stream."""

from __future__ import annotations

import logging
import logging.handlers
import os
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import IO, TextIO

from serving.shared.errors import InputError
from serving.shared.terminal import print

TAIL_LINES = 12
FILE_BYTES = 64 * 1024 * 1024  # size at which the log file is rotated, to FILE.1 to FILE.3
ROTATED_FILES = 3


def new_log_file() -> Path:
    """Create an empty log file in the folder for temporary files, readable only by this user."""
    descriptor, name = tempfile.mkstemp(prefix="tailor-serve-", suffix=".log")
    os.close(descriptor)
    return Path(name)


def remove_log_files(path: Path) -> None:
    """Remove a log file and its rotated files."""
    for number in range(ROTATED_FILES + 1):
        path.with_name(f"{path.name}.{number}" if number else path.name).unlink(missing_ok=True)


class ServerLog:
    """Reads a process's output line by line. path: the log file, appended to, rotated by size. forward: a stream.

    Raises InputError when the file cannot be written.
    """

    def __init__(self, path: Path | None = None, forward: TextIO | None = None) -> None:
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._forward = forward
        self._file: logging.Handler | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = logging.handlers.RotatingFileHandler(
                    path, "w", FILE_BYTES, ROTATED_FILES, encoding="utf-8"
                )
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}; give a log file that can be written") from None
            self._file.setFormatter(logging.Formatter("%(message)s"))
        self._reader: threading.Thread | None = None

    def follow(self, output: IO[bytes]) -> None:
        """Read a process's output in a thread until it ends: the server would block on a full pipe."""
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    def tail(self) -> str:
        """The last lines, each indented; empty if there are none."""
        return "\n".join(f"  {line[:400]}" for line in self._tail)

    def drain(self, timeout: float = 2.0) -> None:
        """Wait until the last lines of an ended process are read."""
        if self._reader:
            self._reader.join(timeout)
            self._reader = None

    def close(self) -> None:
        """Write the last lines and close the file."""
        self.drain()
        if self._file:
            self._file.close()

    def _read(self, output: IO[bytes]) -> None:
        with output:
            for encoded in output:
                line = encoded.decode(errors="replace").rstrip("\r\n")
                self._tail.append(line)
                if self._file:
                    self._file.emit(logging.makeLogRecord({"msg": line}))
                if self._forward:
                    try:
                        print(line, file=self._forward, flush=True)
                    except (OSError, ValueError):  # the reader of the stream has exited; the server must not fail
                        self._forward = None
