"""The access log of `classifier`: one JSON line a request, without a word of the image, in files of bounded size.

Off unless TAILOR_ACCESS_LOG names a folder. Every instance of every version writes a file of its own there, because the
instances are processes and none may rotate what another one writes.
"""

from __future__ import annotations

import json
import logging.handlers
import os
import time
from pathlib import Path

FOLDER_VARIABLE = "TAILOR_ACCESS_LOG"
MAX_BYTES = 16 * 1024 * 1024
BACKUPS = 3  # older files of an instance, each of MAX_BYTES
ID_LENGTH = 64  # characters of the caller's request id; it may be megabytes


class AccessLog:
    """An open log, or one that does nothing. `lost` is called, without arguments, for a line that cannot be written."""

    def __init__(self, folder, name, lost):
        self.handler = None
        if not folder:
            return
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True, mode=0o750)
        # Opened now: a folder that cannot be written shall fail the load of the model, not each request.
        self.handler = logging.handlers.RotatingFileHandler(
            path / f"{name}.jsonl", maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8"
        )
        self.handler.handleError = lambda _record: lost()

    def write(self, request_id, started, images, size, prior, outcome):
        """One line. started: time.monotonic() at arrival. size: encoded bytes of all images. outcome: ok or a reason."""
        if self.handler is None:
            return
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
        # A record is what the handler takes; its level and name are never written.
        self.handler.handle(logging.makeLogRecord({"msg": json.dumps(entry, separators=(",", ":"))}))

    def close(self):
        """Close the file."""
        if self.handler is not None:
            self.handler.close()


def open_access_log(args, lost):
    """The log of the model instance with these initialize arguments, in the folder that the environment names."""
    name = f"{args['model_instance_name']}_version_{args['model_version']}"
    return AccessLog(os.environ.get(FOLDER_VARIABLE), name, lost)
