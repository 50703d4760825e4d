"""The access log of `classifier`: one JSON line per request, without image data, in files of bounded size.

Off unless TAILOR_ACCESS_LOG names a folder. Each instance of each version writes its own file there: instances are
separate processes, and a process must not rotate a file that another one writes.
"""

from __future__ import annotations

import json
import logging.handlers
import os
import time
from pathlib import Path

FOLDER_VARIABLE = "TAILOR_ACCESS_LOG"
MAX_BYTES = 16 * 1024 * 1024
BACKUPS = 3  # rotated files of an instance, each of MAX_BYTES
ID_LENGTH = 64  # characters of the request id that are logged; a caller may send megabytes


class AccessLog:
    """The log of one instance.

    count_lost: called without arguments for each line that cannot be written. Raises OSError if the file cannot be
    opened.
    """

    def __init__(self, folder, name, count_lost, max_bytes=MAX_BYTES, backups=BACKUPS):
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)
        # Opened at the load, so that a folder that is not writable fails the load and not each request.
        self.handler = logging.handlers.RotatingFileHandler(
            folder / f"{name}.jsonl", maxBytes=max_bytes, backupCount=backups, encoding="utf-8"
        )
        self.handler.handleError = lambda _record: count_lost()

    def write(self, request_id, started, images, size, prior, outcome):
        """Write one line.

        started: time.monotonic() at the start of the batch. images: number of rows. size: encoded bytes of all images.
        prior: its kind, `mixed`, or None for a rejected request. outcome: `ok`, `student` or the reason of a rejection.
        """
        now = time.time()
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z",
            "request": request_id[:ID_LENGTH],
            "images": images,
            "bytes": size,
            "prior": prior,
            "outcome": outcome,
            "milliseconds": round((time.monotonic() - started) * 1000, 3),
        }
        # The handler needs a record; its level and name are not written.
        self.handler.handle(logging.makeLogRecord({"msg": json.dumps(entry, separators=(",", ":"))}))

    def close(self):
        """Close the file."""
        self.handler.close()


def open_access_log(args, count_lost):
    """Open the log of a model instance; None if TAILOR_ACCESS_LOG is not set. args: the arguments of `initialize`."""
    folder = os.environ.get(FOLDER_VARIABLE)
    name = f"{args['model_instance_name']}_version_{args['model_version']}"
    return AccessLog(Path(folder), name, count_lost) if folder else None
