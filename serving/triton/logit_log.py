"""What `classifier` stores of its requests for later training: logits of a sample of the images, and unknown images.

The logit log: balanced logits in Parquet files, read by `tailor drift`.

Off unless TAILOR_LOGIT_LOG names a folder. A row is a time and the logits of one image before any prior; it has no data
of the image, the caller or the response. Files are written atomically, so a killed server leaves readable ones. The
oldest files are deleted if the folder would exceed its limit. One thread writes; no request waits for it. Needs pyarrow
and numpy.

Unknown images: encoded images whose answer has `unknown`, unchanged, to be labelled. Off unless TAILOR_UNKNOWN_IMAGES names a
folder. The newest are kept, at most KEPT of them and within a limit of bytes.
"""

import base64
import contextlib
import fcntl
import hashlib
import json
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
SMALLEST_LIMIT = 1 << 20
# A file is rewritten with new rows until it has FILE_BYTES (1/FILES of the limit if that is less) or this age.
FILE_BYTES, FILE_SECONDS, FILES = 4 << 20, 3600.0, 16
WRITE_EVERY = 10.0  # seconds; a killed server loses the rows of this time
QUEUE_BYTES = 16 << 20  # limit of the queue; further rows are dropped and counted
NAME = re.compile(r"logits-(\d{8,})-[0-9a-f]{8}\.parquet")
FORMAT = "1"
LOGGED, LOST = "tailor_logit_log_total", "tailor_logit_log_lost_total"  # counters

UNKNOWN_VARIABLE = "TAILOR_UNKNOWN_IMAGES"
UNKNOWN_LIMIT_VARIABLE = "TAILOR_UNKNOWN_IMAGES_LIMIT"  # bytes of the kept images
KEPT = 1000  # images
UNKNOWN_NAME = re.compile(r"[0-9a-f]{32}\.(jpg|png|webp)")  # from the sha256 of the file
SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp"}
UNKNOWN_KEPT, UNKNOWN_LOST = "tailor_unknown_kept_total", "tailor_unknown_lost_total"  # counters


def open_logit_log(args, manifest, read_images, metrics):
    """Open the log of a model instance; None if TAILOR_LOGIT_LOG is not set.

    args: the arguments of `initialize`. read_images: decodes images to the network's input, uint8 [n,3,S,S]. Raises
    ValueError, which fails the load, if a setting, the folder or pyarrow is not usable.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    share, limit = read_setting(SHARE_VARIABLE, "0.01", float), read_setting(LIMIT_VARIABLE, str(1 << 30), int)
    if not 0 < share <= 1:
        raise ValueError(f"{SHARE_VARIABLE} is {share:g}; expected a share above 0, at most 1")
    if limit < SMALLEST_LIMIT:
        raise ValueError(f"{LIMIT_VARIABLE} is {limit}; expected at least {SMALLEST_LIMIT} bytes")
    probes = read_images(golden_images(args))
    metadata = {
        "tailor_logits": FORMAT,
        "version": args["model_version"],
        "student_sha256": manifest["files"]["student.onnx"],
        "classes_sha256": classes_sha256(manifest["classes"]),
    }
    try:
        return LogitLog(Path(folder), share, limit, len(manifest["classes"]), metadata, probes, metrics)
    except ImportError:
        raise ValueError(f"{FOLDER_VARIABLE} is set, which needs pyarrow; install it") from None
    except OSError as error:
        raise ValueError(f"{FOLDER_VARIABLE}: {folder}: {error.strerror}") from None


class LogitLog:
    """An open log with its writer thread. metadata: of its files. probes: uint8 [n,3,S,S], images not to log.

    Requests of health checks are not user traffic, so golden images and images of one colour are not logged.
    """

    def __init__(
        self, folder, share, limit, classes, metadata, probes, metrics, write_every=WRITE_EVERY, queue_bytes=QUEUE_BYTES
    ):
        import pyarrow.parquet

        self.arrow, self.parquet = pyarrow, pyarrow.parquet
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "is not writable")
        self.folder, self.share, self.limit, self.metadata, self.metrics = folder, share, limit, metadata, metrics
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
        with folder_lock(self.folder):
            for leftover in self.folder.glob(".logits-*.partial"):  # of killed processes, because this one has the lock
                leftover.unlink()
            files = log_files(self.folder)
            # Numbers, because a clock may be set back. The random part separates servers whose files were moved
            # together.
            number = int(NAME.fullmatch(files[-1].name)[1]) + 1 if files else 1
            name = self.name or f"logits-{number:08d}-{secrets.token_hex(4)}.parquet"
            content = stream.getvalue()
            delete_oldest(files, name, len(content), self.limit)
            write_atomically(self.folder / name, content)
        self.name = name


class UnknownImages:
    """Keeps images of the requests in a folder, with a writer thread; no request waits for it.

    probes: encoded images of health checks, which are not kept. A file has the name of its content, so an image that is sent
    again is kept once. Files of other names in the folder are neither counted nor deleted. An operator may move files away.
    """

    def __init__(self, folder, limit, probes, metrics, write_every=1.0, most=KEPT):
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "is not writable")
        self.folder, self.limit, self.metrics, self.most = folder, limit, metrics, most
        self.write_every, self.probes = write_every, {unknown_name(image) for image in probes}
        self.lock, self.waiting, self.waiting_bytes = threading.Lock(), {}, 0
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="unknown images", daemon=True)
        self.thread.start()

    def offer(self, encoded):
        """Queue image files, bytes that were decoded without an error."""
        for data in encoded:
            name = unknown_name(data)
            with self.lock:
                if name in self.probes or name in self.waiting:
                    continue
                if len(data) > self.limit or self.waiting_bytes + len(data) > QUEUE_BYTES:
                    self.metrics.count(UNKNOWN_LOST, reason="size" if len(data) > self.limit else "queue")
                    continue
                self.waiting[name] = data
                self.waiting_bytes += len(data)

    def write(self):
        """Write the queued images; delete the oldest ones above the limits."""
        with self.lock:
            waiting, self.waiting, self.waiting_bytes = self.waiting, {}, 0
        try:
            with folder_lock(self.folder):
                for leftover in self.folder.glob(
                    f".{'[0-9a-f]' * 32}.*.partial"
                ):  # of killed processes, as in LogitLog
                    leftover.unlink(missing_ok=True)
                files = {}  # name → time and size
                for path in unknown_files(self.folder):
                    with contextlib.suppress(FileNotFoundError):
                        files[path.name] = path.stat().st_mtime_ns, path.stat().st_size
                for name in [name for name in waiting if name in files]:
                    del waiting[name]
                for name in list(waiting)[-self.most :]:
                    sizes = [size for _, size in files.values()]
                    while files and (len(files) >= self.most or sum(sizes) + len(waiting[name]) > self.limit):
                        oldest = min(files, key=lambda each: (files[each][0], each))
                        (self.folder / oldest).unlink(missing_ok=True)
                        sizes.remove(files.pop(oldest)[1])
                    data = waiting[name]
                    write_atomically(self.folder / name, data)
                    files[name] = time.time_ns(), len(data)
                    del waiting[name]
                    self.metrics.count(UNKNOWN_KEPT)
        except OSError:
            self.metrics.count(UNKNOWN_LOST, len(waiting), reason="disk")

    def close(self):
        """Write the queued images and end the thread; waits at most 5 s if the disk hangs."""
        self.closed.set()
        self.thread.join(5)

    def _run(self):
        while not self.closed.wait(self.write_every):
            if self.waiting:
                self.write()
        if self.waiting:
            self.write()


def open_unknown_images(args, metrics):
    """Open the folder of an instance; None if TAILOR_UNKNOWN_IMAGES is not set. Raises ValueError, which fails the load."""
    folder = os.environ.get(UNKNOWN_VARIABLE)
    if not folder:
        return None
    limit = read_setting(UNKNOWN_LIMIT_VARIABLE, str(256 << 20), int)
    if limit < SMALLEST_LIMIT:
        raise ValueError(f"{UNKNOWN_LIMIT_VARIABLE} is {limit}; expected at least {SMALLEST_LIMIT} bytes")
    try:
        return UnknownImages(Path(folder), limit, golden_images(args), metrics)
    except OSError as error:
        raise ValueError(f"{UNKNOWN_VARIABLE}: {folder}: {error.strerror}") from None


def unknown_name(data):
    """The file name of an image: of its content, so it has nothing that a caller chooses."""
    return hashlib.sha256(data).hexdigest()[:32] + SUFFIXES.get(bytes(data[:2]), ".jpg")


def unknown_files(folder):
    """The kept images of a folder, in any order."""
    return [path for path in Path(folder).iterdir() if UNKNOWN_NAME.fullmatch(path.name) and path.is_file()]


def golden_images(args):
    """The encoded images of the golden requests. args: the arguments of `initialize`."""
    golden = json.loads(Path(args["model_repository"], args["model_version"], "golden.json").read_bytes())
    return [base64.b64decode(entry["image"]) for entry in golden]


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


@contextlib.contextmanager
def folder_lock(folder):
    """Hold the folder's lock (flock): only one process at a time counts its bytes and writes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_atomically(path, content):
    """Write a file atomically: write a temporary file beside `path`, sync it, rename it."""
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
    """sha256 of a list of class names, which identifies it in a file's metadata."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def read_setting(variable, default, kind):
    """Read a number of type `kind` from an environment variable. Raises ValueError naming the variable."""
    text = os.environ.get(variable) or default
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{variable} is {text!r}; expected a number") from None
