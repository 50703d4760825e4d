"""Files that the logs of `classifier` share a folder for: lock, atomic writes, settings from the environment, probes."""

import base64
import contextlib
import fcntl
import json
import os
from pathlib import Path

SMALLEST_LIMIT = 1 << 20  # bytes of a folder


def read_setting(variable, default, kind):
    """Read a number of type `kind` from an environment variable. Raises ValueError naming the variable."""
    text = os.environ.get(variable) or default
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{variable} is {text!r}; expected a number") from None


def read_limit(variable, default):
    """Read the limit of a folder in bytes. Raises ValueError naming the variable."""
    limit = read_setting(variable, str(default), int)
    if limit < SMALLEST_LIMIT:
        raise ValueError(f"{variable} is {limit}; expected at least {SMALLEST_LIMIT} bytes")
    return limit


def make_folder(folder):
    """Create a folder that other users cannot read. Raises OSError, also if it is not writable."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "is not writable")


def golden_images(args):
    """The encoded images of the golden requests. args: the arguments of `initialize`."""
    golden = json.loads(Path(args["model_repository"], args["model_version"], "golden.json").read_bytes())
    return [base64.b64decode(entry["image"]) for entry in golden]


@contextlib.contextmanager
def folder_lock(folder):
    """Hold the folder's lock (flock): only one process at a time counts its bytes and writes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_atomically(path, content, make_room=None):
    """Write a file atomically: write a temporary file beside `path`, sync it, rename it.

    make_room: called before the rename, to delete other files; not if the disk is full, so that none is deleted in vain.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if make_room:
            make_room()
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
