"""Encoded images whose answer has `unknown`, stored unchanged, to be labelled.

Off unless TAILOR_UNKNOWN_IMAGES names a folder. The newest are kept, at most KEPT of them and within a limit of bytes. An image
is written before older ones are deleted for it: a full disk keeps the old ones, and the new one is counted as lost.
"""

import contextlib
import hashlib
import os
import re
import threading
import time
from functools import partial
from pathlib import Path

FOLDER_VARIABLE = "TAILOR_UNKNOWN_IMAGES"
LIMIT_VARIABLE = "TAILOR_UNKNOWN_IMAGES_LIMIT"  # bytes of the kept images
KEPT = 1000  # images
QUEUE_BYTES = 16 << 20  # limit of the queue; further images are dropped and counted
NAME = re.compile(r"[0-9a-f]{32}\.(jpg|png|webp)")  # from the sha256 of the file
SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp"}
UNKNOWN_KEPT, UNKNOWN_LOST = "tailor_unknown_kept_total", "tailor_unknown_lost_total"  # counters


def open_unknown_images(args, metrics, files):
    """Open the folder of an instance; None if TAILOR_UNKNOWN_IMAGES is not set.

    args: the arguments of `initialize`. files: the module folder_files. Raises ValueError, which fails the load.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    limit = files.read_limit(LIMIT_VARIABLE, 256 << 20)
    try:
        return UnknownImages(Path(folder), limit, files.golden_images(args), metrics, files)
    except OSError as error:
        raise ValueError(f"{FOLDER_VARIABLE}: {folder}: {error.strerror}") from None


class UnknownImages:
    """Keeps images of the requests in a folder, with a writer thread; no request waits for it.

    probes: encoded images of health checks, which are not kept. files: the module folder_files. A file has the name of its
    content, so an image that is sent again is kept once. Files of other names in the folder are neither counted nor deleted. An
    operator may move files away.
    """

    def __init__(self, folder, limit, probes, metrics, files, write_every=1.0, most=KEPT):
        files.make_folder(folder)
        self.files, self.folder, self.limit, self.metrics, self.most = files, folder, limit, metrics, most
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
        """Write the queued images; delete the oldest ones above the limits. On a full disk none is deleted or kept."""
        with self.lock:
            waiting, self.waiting, self.waiting_bytes = self.waiting, {}, 0
        try:
            with self.files.folder_lock(self.folder):
                # Of killed processes, because this one has the lock.
                for leftover in self.folder.glob(f".{'[0-9a-f]' * 32}.*.partial"):
                    leftover.unlink(missing_ok=True)
                kept = self._kept()
                for name in [name for name in waiting if name in kept]:
                    del waiting[name]
                for name in list(waiting)[-self.most :]:
                    data = waiting[name]
                    self.files.write_atomically(self.folder / name, data, partial(self._make_room, kept, len(data)))
                    kept[name] = time.time_ns(), len(data)
                    del waiting[name]
                    self.metrics.count(UNKNOWN_KEPT)
        except OSError:
            self.metrics.count(UNKNOWN_LOST, len(waiting), reason="disk")

    def _kept(self):
        """The kept images: name → time and size."""
        kept = {}
        for path in unknown_files(self.folder):
            with contextlib.suppress(FileNotFoundError):
                kept[path.name] = path.stat().st_mtime_ns, path.stat().st_size
        return kept

    def _make_room(self, kept, size):
        """Delete the oldest of the kept images until one more of `size` bytes is within the limits."""
        total = size + sum(each for _, each in kept.values())
        while kept and (len(kept) >= self.most or total > self.limit):
            oldest = min(kept, key=lambda name: (kept[name][0], name))
            (self.folder / oldest).unlink(missing_ok=True)
            total -= kept.pop(oldest)[1]

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


def unknown_name(data):
    """The file name of an image: of its content, so it has nothing that a caller chooses."""
    return hashlib.sha256(data).hexdigest()[:32] + SUFFIXES.get(bytes(data[:2]), ".jpg")


def unknown_files(folder):
    """The kept images of a folder, in any order."""
    return [path for path in Path(folder).iterdir() if NAME.fullmatch(path.name) and path.is_file()]
