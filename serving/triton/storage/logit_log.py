"""Log of balanced logits of `classifier` in Parquet files, which `tailor drift` reads.

Off unless TAILOR_LOGIT_LOG names a folder. A row is a time and the logits of one image before any prior; it has no data
of the image, the caller or the response. Files are written atomically, so a killed server leaves readable ones. The
oldest files are deleted if the folder would exceed its limit. One thread writes; no request waits for it. Needs pyarrow
and numpy.
"""

import hashlib
import os
import queue
import re
import secrets
import threading
import time
from pathlib import Path

import numpy as np

FOLDER_VARIABLE = "TAILOR_LOGIT_LOG"
SHARE_VARIABLE = "TAILOR_LOGIT_LOG_SHARE"
LIMIT_VARIABLE = "TAILOR_LOGIT_LOG_LIMIT"  # bytes of the whole folder
# A file is rewritten with new rows until it has FILE_BYTES (1/FILES of the limit if that is less) or this age.
FILE_BYTES, FILE_SECONDS, FILES = 4 << 20, 3600.0, 16
WRITE_EVERY = 10.0  # seconds; a killed server loses the rows of this time
QUEUE_BYTES = 16 << 20  # limit of the queue; further rows are dropped and counted
NAME = re.compile(r"logits-(\d{8,})-[0-9a-f]{8}\.parquet")
FORMAT = "1"
LOGGED, LOST = "tailor_logit_log_total", "tailor_logit_log_lost_total"  # counters


def open_logit_log(args, manifest, read_images, metrics, files):
    """Open the log of a model instance; None if TAILOR_LOGIT_LOG is not set.

    args: the arguments of `initialize`. read_images: decodes images to the network's input, uint8 [n,3,S,S]. files: the
    module folder_files. Raises ValueError, which fails the load, if a setting, the folder or pyarrow is not usable.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    share, limit = files.read_setting(SHARE_VARIABLE, "0.01", float), files.read_limit(LIMIT_VARIABLE, 1 << 30)
    if not 0 < share <= 1:
        raise ValueError(f"{SHARE_VARIABLE} is {share:g}; expected a share above 0, at most 1")
    probes = read_images(files.golden_images(args))
    metadata = {
        "tailor_logits": FORMAT,
        "version": args["model_version"],
        "student_sha256": manifest["files"]["student.onnx"],
        "classes_sha256": classes_sha256(manifest["classes"]),
    }
    try:
        return LogitLog(Path(folder), share, limit, len(manifest["classes"]), metadata, probes, metrics, files)
    except ImportError:
        raise ValueError(f"{FOLDER_VARIABLE} is set, which needs pyarrow; install it") from None
    except OSError as error:
        raise ValueError(f"{FOLDER_VARIABLE}: {folder}: {error.strerror}") from None


class LogitLog:
    """An open log with its writer thread.

    metadata: of its files. probes: uint8 [n,3,S,S], images not to log. files: the module folder_files.
    Requests of health checks are not user traffic, so golden images and images of one colour are not logged.
    """

    def __init__(
        self, folder, share, limit, classes, metadata, probes, metrics, files,
        write_every=WRITE_EVERY, queue_bytes=QUEUE_BYTES,
    ):  # fmt: skip
        import pyarrow.parquet

        self.arrow, self.parquet = pyarrow, pyarrow.parquet
        files.make_folder(folder)
        self.files, self.folder, self.share, self.limit = files, folder, share, limit
        self.metadata, self.metrics = metadata, metrics
        self.write_every = write_every
        self.probes, self.random = {image.tobytes() for image in probes}, np.random.default_rng()
        row_bytes = 4 * classes + 8
        self.queue = queue.Queue(max(1, queue_bytes // row_bytes))
        rows = max(1, min(FILE_BYTES, limit // FILES) // row_bytes)
        self.times, self.logits = np.zeros(rows, "datetime64[ms]"), np.zeros((rows, classes), np.float32)
        self._begin_file()
        self.closed, self.wake = False, threading.Event()
        self.thread = threading.Thread(target=self._run, name="logit log", daemon=True)
        self.thread.start()

    def offer(self, images, logits):
        """Queue a sample of images, uint8 [n,3,S,S], with their logits [n,C]; does not wait for the disk."""
        now = int(time.time() * 1000)
        for row in np.flatnonzero(self.random.random(len(logits)) < self.share):
            image = images[row]
            if image.min() == image.max() or image.tobytes() in self.probes:
                continue
            try:
                self.queue.put_nowait((now, logits[row].astype(np.float32)))
            except queue.Full:
                self.metrics.count(LOST, reason="queue")
        if self.queue.qsize() > self.queue.maxsize // 4:
            self.wake.set()

    def close(self):
        """Write the queued rows and end the thread; waits at most 5 s if the disk hangs."""
        self.closed = True
        self.wake.set()
        self.thread.join(5)
        if self.thread.is_alive():
            self.metrics.count(LOST, self.row_count - self.saved_rows + self.queue.qsize(), reason="disk")

    def write(self):
        """Write all queued rows to disk."""
        for _ in range(self.queue.qsize()):
            self.times[self.row_count], self.logits[self.row_count] = self.queue.get_nowait()
            self.row_count += 1
            if self.row_count == len(self.times):
                self._save(last=True)
        self._save(last=time.monotonic() - self.file_started > FILE_SECONDS)

    def _run(self):
        while not self.closed:
            self.wake.wait(self.write_every)
            self.wake.clear()
            self.write()
        self.write()  # rows that were queued during the last write

    def _begin_file(self):
        """Begin a new file: no name, no rows in memory or on disk, its start time."""
        self.name, self.row_count, self.saved_rows, self.file_started = None, 0, 0, time.monotonic()

    def _save(self, last):
        """Rewrite the file if it has new rows. last: then begin a new file; rows not written (full disk) are lost."""
        new_rows = self.row_count - self.saved_rows
        try:
            if new_rows:
                self._write_file()
                self.metrics.count(LOGGED, new_rows)
                self.saved_rows = self.row_count
        except OSError:
            if last:
                self.metrics.count(LOST, new_rows, reason="disk")
        if last:
            self._begin_file()

    def _write_file(self):
        times, logits, arrow = self.times[: self.row_count], self.logits[: self.row_count], self.arrow

        def column(kind, array):  # not pyarrow.array, which imports pandas: 0.5 s of CPU time and 43 MB
            return arrow.Array.from_buffers(kind, array.size, [None, arrow.py_buffer(array)])

        columns = {
            "time": column(arrow.timestamp("ms", tz="UTC"), times.view(np.int64)),
            "logits": arrow.FixedSizeListArray.from_arrays(column(arrow.float32(), logits), logits.shape[1]),
        }
        stream, table = arrow.BufferOutputStream(), arrow.table(columns).replace_schema_metadata(self.metadata)
        self.parquet.write_table(table, stream, compression="zstd", use_dictionary=False, write_statistics=["time"])
        with self.files.folder_lock(self.folder):
            for leftover in self.folder.glob(".logits-*.partial"):  # of killed processes, because this one has the lock
                leftover.unlink()
            files = log_files(self.folder)
            # Numbers, because a clock may be set back. The random part separates servers whose files were moved
            # together.
            number = int(NAME.fullmatch(files[-1].name)[1]) + 1 if files else 1
            name = self.name or f"logits-{number:08d}-{secrets.token_hex(4)}.parquet"
            content = stream.getvalue()
            delete_oldest(files, name, len(content), self.limit)
            self.files.write_atomically(self.folder / name, content)
        self.name = name


def log_files(folder):
    """The files of a log in a folder, oldest first."""
    files = [path for path in Path(folder).iterdir() if NAME.fullmatch(path.name) and path.is_file()]
    return sorted(files, key=lambda path: (int(NAME.fullmatch(path.name)[1]), path.name))


def delete_oldest(files, name, size, limit):
    """Delete the oldest files, never `name`, until `size` more bytes fit under the limit. Needs the folder's lock."""
    excess = size + sum(path.stat().st_size for path in files) - limit
    for path in files:
        if excess > 0 and path.name != name:
            excess -= path.stat().st_size
            path.unlink()


def classes_sha256(names):
    """sha256 of a list of class names, which identifies it in a file's metadata."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
