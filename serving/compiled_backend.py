"""The local server's own backend for `student`: triton/student_backend.cpp, compiled against the installed onnxruntime.

Compiled at the first start and kept in the user's cache folder. Without a compiler `student` runs in Triton's python backend.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from serving.errors import ServingError

SOURCES = [Path(__file__).with_name("triton") / name for name in ("student_backend.cpp", "student_backend_api.h")]
ONNXRUNTIME_NAME = "libonnxruntime.so."
BACKEND = "student"
LIBRARY_NAME = f"libtriton_{BACKEND}.so"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")
COMPILE_TIMEOUT = 120.0  # seconds


class NotCompiled(ServingError):
    """The backend cannot be compiled here; the message says why in one line."""


def compiled_backend() -> Path:
    """The compiled backend, from the cache or compiled now. Raises NotCompiled.

    The environment variable CXX names another compiler than g++; an empty one means none.
    """
    compiler = os.environ.get("CXX", "g++")
    found = shutil.which(compiler)
    if found is None:
        raise NotCompiled(f"there is no compiler {compiler!r} on PATH; install g++")
    # JSON quotes a string as C++ does.
    definitions = [f"-D{name}={json.dumps(value, ensure_ascii=False)}" for name, value in _onnxruntime().items()]
    command = [found, *FLAGS, *definitions, str(SOURCES[0]), "-ldl"]
    key = hashlib.sha256("\0".join([*command, _output_of([found, "--version"])]).encode())
    for path in SOURCES:
        key.update(path.read_bytes())
    try:
        library = _cache_folder() / key.hexdigest() / LIBRARY_NAME
        if not library.is_file():
            library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:  # another start may compile meanwhile
                _output_of([*command, "-o", f"{scratch}/{LIBRARY_NAME}"])
                Path(scratch, LIBRARY_NAME).replace(library)
    except OSError as error:
        raise NotCompiled(f"{error.filename}: {error.strerror}; set XDG_CACHE_HOME to a writable folder") from None
    if not os.access(library, os.X_OK):
        raise NotCompiled(
            f"{library}: its file system is mounted noexec; set XDG_CACHE_HOME to a folder on another one"
        )
    return library


def _onnxruntime() -> dict[str, str]:
    """Path and version of the installed ONNX Runtime's shared library. Raises NotCompiled."""
    spec = importlib.util.find_spec("onnxruntime")
    folders = spec.submodule_search_locations if spec else None
    libraries = [path for folder in folders or () for path in Path(folder).glob(f"capi/{ONNXRUNTIME_NAME}*")]
    if len(libraries) != 1:
        raise NotCompiled(
            f"the installed onnxruntime has {len(libraries)} files capi/{ONNXRUNTIME_NAME}*; expected one"
        )
    return {"ORT_LIBRARY": str(libraries[0]), "ORT_VERSION": libraries[0].name.removeprefix(ONNXRUNTIME_NAME)}


def _cache_folder() -> Path:
    """The folder of this program in the user's cache folder by the XDG convention. Raises NotCompiled."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given).absolute() if given else Path.home() / ".cache") / "tailor"
    except RuntimeError:
        raise NotCompiled("this user has no home folder; set XDG_CACHE_HOME to a writable folder") from None


def _output_of(command: list[str]) -> str:
    """What a compiler prints. Raises NotCompiled with its first line of error."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise NotCompiled(f"{command[0]}: did not end within {COMPILE_TIMEOUT:.0f} s") from None
    if ended.returncode:
        reason = next((line for line in ended.stderr.splitlines() if "error" in line), ended.stderr)
        raise NotCompiled(f"{command[0]}: {' '.join(reason.split())[:300]}")
    return ended.stdout
