"""The logit log of `classifier`: what the student said of a sample of the images, before any prior, for `tailor drift`.

Off unless TAILOR_LOGIT_LOG names a folder. A row is a time and the balanced logits of one image; nothing of the image,
the caller or the answer. Files are Parquet, each written whole beside its name and renamed, so that a server that is
killed leaves readable ones; the oldest go where the folder would exceed its limit. All of it happens in a thread of its
own, which requests never wait for. Needs pyarrow beside numpy.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import threading
import time
from pathlib import Path

import numpy as np

FOLDER_VARIABLE = "TAILOR_LOGIT_LOG"
SHARE_VARIABLE = "TAILOR_LOGIT_LOG_SHARE"
LIMIT_VARIABLE = "TAILOR_LOGIT_LOG_LIMIT"  # bytes of the whole folder
SHARE, LIMIT, SMALLEST_LIMIT = "0.01", str(1 << 30), 1 << 20
# A file grows by being written again, until it has this size (a sixteenth of the limit if that is less) or this age.
FILE_BYTES, FILE_SECONDS, FILES = 4 << 20, 3600.0, 16
WRITE_EVERY = 10.0  # seconds: what a killed server loses
WAITING_BYTES = 16 << 20  # rows that wait for the thread; of more, none is kept
NAME = re.compile(r"logits-(\d{8,})-[0-9a-f]{8}\.parquet")
FORMAT = "1"


def open_logit_log(args, manifest, read_images, metrics):
    """The log of the model instance with these initialize arguments, or None where the environment names no folder.

    read_images: from encoded images to the network's input, uint8 [n,3,S,S]. Raises ValueError, which fails
    the load, where the settings or the folder cannot be used.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    share, limit = setting(SHARE_VARIABLE, SHARE, float), setting(LIMIT_VARIABLE, LIMIT, int)
    if not 0 < share <= 1:
        raise ValueError(f"{SHARE_VARIABLE} is {share:g}; expected a share above 0, at most 1")
    if limit < SMALLEST_LIMIT:
        raise ValueError(f"{LIMIT_VARIABLE} is {limit}; expected at least {SMALLEST_LIMIT} bytes")
    golden = Path(args["model_repository"], args["model_version"], "golden.json")
    entries = json.loads(golden.read_bytes())
    probes = np.concatenate([read_images([base64.b64decode(entry["image"])]) for entry in entries])
    about = {
        "tailor_logits": FORMAT,
        "version": args["model_version"],
        "student_sha256": manifest["files"]["student.onnx"],
        "classes_sha256": classes_sha256(manifest["classes"]),
    }
    try:
        return LogitLog(Path(folder), share, limit, len(manifest["classes"]), about, probes, metrics)
    except ImportError:
        raise ValueError(f"{FOLDER_VARIABLE} is set, which needs pyarrow; install it") from None
    except OSError as error:
        raise ValueError(f"{FOLDER_VARIABLE}: {folder}: {error.strerror}") from None


class LogitLog:
    """An open log, with its thread. about: the metadata of its files. probes: uint8 [n,3,S,S], images never logged.

    What monitors ask is no traffic: neither the golden images nor a blank one is logged.
    """

    def __init__(self, folder, share, limit, classes, about, probes, metrics):
        import pyarrow.parquet

        self.parquet, self.arrow = pyarrow.parquet, pyarrow
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "is not writable")
        self.folder, self.share, self.limit, self.about, self.metrics = folder, share, limit, about, metrics
        self.probes = {image.tobytes() for image in probes}
        self.random = np.random.default_rng()
        self.row_bytes = 4 * classes + 8
        self.rows_per_file = max(1, min(FILE_BYTES, limit // FILES) // self.row_bytes)
        self.lock = threading.Lock()
        self.waiting, self.waiting_bytes = [], 0  # (milliseconds, float32 [n,C]) since the thread looked last
        self._begin()
        self.closed, self.wake = False, threading.Event()
        self.thread = threading.Thread(target=self._write_often, name="logit log", daemon=True)
        self.thread.start()

    def offer(self, images, logits):
        """Log a sample of answered images, uint8 [n,3,S,S], by their logits [n,C]; returns at once."""
        chosen = np.flatnonzero(self.random.random(len(logits)) < self.share)
        chosen = [row for row in chosen if not self._is_probe(images[row])]
        if not chosen:
            return
        size = len(chosen) * self.row_bytes
        with self.lock:
            full = self.waiting_bytes + size > WAITING_BYTES
            if not full:
                self.waiting.append((int(time.time() * 1000), logits[chosen].astype(np.float32)))
                self.waiting_bytes += size
                if self.waiting_bytes > WAITING_BYTES // 4:
                    self.wake.set()
        if full:
            self.metrics.logits_lost(len(chosen), "queue")

    def close(self):
        """Write what waits and end the thread; a disk that hangs is waited for a few seconds."""
        self.closed = True
        self.wake.set()
        self.thread.join(5)
        if self.thread.is_alive():
            self.metrics.logits_lost(self.held - self.saved + sum(len(rows) for _, rows in self.waiting), "disk")

    def write(self):
        """Put all that waits on disk."""
        with self.lock:
            waiting, self.waiting, self.waiting_bytes = self.waiting, [], 0
        for moment, rows in waiting:
            while len(rows):
                part = rows[: self.rows_per_file - self.held]
                self.parts.append((moment, part))
                self.held += len(part)
                rows = rows[len(part) :]
                if self.held == self.rows_per_file:
                    self._save()
                    self._begin()
        expired = self.held and time.monotonic() - self.begun > FILE_SECONDS
        if self.held > self.saved:
            self._save(last=expired)
        if expired:
            self._begin()

    def _begin(self):
        """A file anew: rows in memory, and how many of them are on disk."""
        self.name, self.parts, self.held, self.saved, self.begun = None, [], 0, 0, time.monotonic()

    def _save(self, last=True):
        """The file that grows, on disk. Rows that a full disk does not take are tried again, until their file is full."""
        try:
            with locked(self.folder):
                for leftover in self.folder.glob(".logits-*.partial"):  # of the killed: who writes holds the lock
                    leftover.unlink()
                name = self.name or self._new_name()
                content = self._content()
                make_room(self.folder, name, len(content), self.limit)
                write_whole(self.folder / name, content)
        except OSError:
            if last:
                self.metrics.logits_lost(self.held - self.saved, "disk")
            return
        self.metrics.logits_logged(self.held - self.saved)
        self.name, self.saved = name, self.held

    def _content(self):
        times = np.concatenate([np.full(len(rows), moment) for moment, rows in self.parts])
        logits = np.concatenate([rows for _, rows in self.parts])
        arrow = self.arrow
        columns = {
            "time": arrow.array(times, arrow.timestamp("ms", tz="UTC")),
            "logits": arrow.FixedSizeListArray.from_arrays(arrow.array(logits.reshape(-1)), logits.shape[1]),
        }
        stream = arrow.BufferOutputStream()
        table = arrow.table(columns).replace_schema_metadata(self.about)
        self.parquet.write_table(table, stream, compression="zstd", use_dictionary=False, write_statistics=["time"])
        return stream.getvalue()

    def _new_name(self):
        # Numbered, as a clock may jump back; the rest keeps two servers apart whose files were taken away.
        newest = max((int(NAME.fullmatch(path.name)[1]) for path in log_files(self.folder)), default=0)
        return f"logits-{newest + 1:08d}-{secrets.token_hex(4)}.parquet"

    def _is_probe(self, image):
        return image.min() == image.max() or image.tobytes() in self.probes

    def _write_often(self):
        while not self.closed:
            self.wake.wait(WRITE_EVERY)
            self.wake.clear()
            self.write()
        self.write()  # what came while the last was on its way


def log_files(folder):
    """The files of a log, oldest first."""
    found = [path for path in Path(folder).iterdir() if NAME.fullmatch(path.name) and path.is_file()]
    return sorted(found, key=lambda path: (int(NAME.fullmatch(path.name)[1]), path.name))


def make_room(folder, name, size, limit):
    """Delete the oldest files, never `name`, until `size` bytes more fit under the limit. Hold the folder's lock."""
    sizes = {path: path.stat().st_size for path in log_files(folder)}
    total = sum(sizes.values()) + size
    for path, freed in sizes.items():
        if total <= limit:
            return
        if path.name != name:
            path.unlink()
            total -= freed


@contextlib.contextmanager
def locked(folder):
    """Hold the folder's lock: one process at a time counts its bytes and writes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_whole(path, content):
    """Write beside `path`, sync, rename over it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def classes_sha256(names):
    """What tells one list of classes from another in a file's metadata."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def setting(variable, default, kind):
    """A number from the environment. Raises ValueError naming the variable."""
    text = os.environ.get(variable) or default
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{variable} is {text!r}; expected a number") from None
