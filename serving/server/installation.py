"""Find the Triton server of the nvidia-pytriton package and check that its Python stubs can run on this machine.

Triton starts the program `triton_python_backend_stub` ("stub") for each instance of a Python model; elsewhere it is
called an inference process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from serving.repository.signing_keys import KEY_VARIABLE, PASSPHRASE_VARIABLE
from serving.shared.errors import ServingError, install_command
from serving.shared.names import ADMIN_KEY_VARIABLE
from serving.shared.priority import write_stub_launcher

STUB_NAME = "triton_python_backend_stub"
STUB_TIMEOUT = 30.0  # seconds
NEXT_PYTHON = (3, 13)  # first unsupported version: the stubs need numpy below 2, which has no wheel for it


class InstallationError(ServingError):
    """This machine or environment cannot run the local Triton server; the message states what to install."""


@dataclass(frozen=True)
class Installation:
    """The files of a checked Triton server, and the environment variables that it needs in this Python environment."""

    server: Path
    backend_files: dict[str, Path]
    environment: dict[str, str]

    def link(self, runtime: Path, niceness: int) -> dict[str, str]:
        """Link the backend's files into the runtime folder; returns environment variables for the inference processes.

        Triton gets the links because the real paths may contain spaces, which it does not quote.
        """
        backend = runtime / "backends" / "python"
        backend.mkdir(parents=True)
        for name, path in self.backend_files.items():
            if name != STUB_NAME:
                (backend / name).symlink_to(path)
        return write_stub_launcher(backend / STUB_NAME, self.backend_files[STUB_NAME], niceness)


def find_installation() -> Installation:
    """Find and check the server. Raises InstallationError naming what is missing or incompatible.

    Call it before every start: with a stub that cannot load its libraries, the server stays in state LOADING forever.
    """
    if sys.version_info[:2] >= NEXT_PYTHON:
        raise InstallationError(
            f"the local Triton server needs Python 3.11 or 3.12, this is {sys.version_info[0]}.{sys.version_info[1]}; "
            "use one of these, or serve the repository from NVIDIA's Triton container"
        )
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise InstallationError(
            f"nvidia-pytriton, which brings the Triton server, is missing; {install_command('serve')}"
        )
    root = Path(next(iter(spec.submodule_search_locations))) / "tritonserver"
    backend = root / "backends" / "python"
    stub = root / "python_backend_stubs" / f"3.{sys.version_info[1]}" / STUB_NAME
    files = {
        "libtriton_python.so": backend / "libtriton_python.so",
        "triton_python_backend_utils.py": backend / "triton_python_backend_utils.py",
        STUB_NAME: stub,
    }
    for path in (root / "bin" / "tritonserver", *files.values()):
        if not path.is_file():
            raise InstallationError(f"{path}: is missing; pip install --force-reinstall nvidia-pytriton==0.7.0")
    _check_packages()
    environment = child_environment()
    _check_stub(stub, environment)
    return Installation(root / "bin" / "tritonserver", files, environment)


def child_environment() -> dict[str, str]:
    """The environment variables of the server and its inference processes, without the admin key and the signing key.

    A stub embeds libpython and ignores PYTHONHOME and PYTHONPATH. The first `python3` on PATH determines its packages,
    and the dynamic loader determines its libpython. So PATH and LD_LIBRARY_PATH begin with the folders of this
    interpreter.
    """
    secrets = (ADMIN_KEY_VARIABLE, KEY_VARIABLE, PASSPHRASE_VARIABLE)  # `tailor retrain` signs, and starts a server
    environment = {name: value for name, value in os.environ.items() if name not in secrets}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    folder, library = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME")
    if folder and library and ".so" in library and (Path(folder) / library).is_file():
        others = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([folder, others] if others else [folder])
    environment["ORT_DISABLE_TELEMETRY"] = "1"
    return environment


def _check_packages() -> None:
    for module, package in (("onnxruntime", "onnxruntime"), ("PIL", "pillow"), ("numpy", "numpy")):
        if importlib.util.find_spec(module) is None:
            raise InstallationError(f"{package} is missing; {install_command('serve', 'cpu')}")
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        # With numpy 2 these stubs return empty FP32 outputs, with status 200, and crash on strings.
        raise InstallationError(f"numpy {numpy_version} breaks this Triton's Python stubs; pip install 'numpy<2'")
    if not (Path(sys.executable).parent / "python3").exists():
        raise InstallationError(
            f"{Path(sys.executable).parent / 'python3'}: is missing; Triton's stubs need it; use a venv"
        )
    if shutil.which("bash") is None:
        raise InstallationError("bash is not on PATH; Triton starts its Python stubs with it; install bash")


def _check_stub(stub: Path, environment: dict[str, str]) -> None:
    """Run the stub without arguments; if its libraries are found, it prints its usage and exits with status 1.

    Raises InstallationError if it cannot be run, does not exit, or lacks a library (exit status 127).
    """
    try:
        ended = subprocess.run(
            [stub], env=environment, capture_output=True, text=True, timeout=STUB_TIMEOUT, check=False
        )
    except OSError as error:
        raise InstallationError(
            f"{stub}: {error.strerror}; pip install --force-reinstall nvidia-pytriton==0.7.0"
        ) from None
    except subprocess.TimeoutExpired:
        raise InstallationError(f"{stub}: did not end within {STUB_TIMEOUT:.0f} s; reinstall nvidia-pytriton") from None
    if ended.returncode == 127:
        library = f"libpython3.{sys.version_info[1]}.so.1.0"
        if library in ended.stderr:
            raise InstallationError(
                f"{library} is missing; install it (Debian: apt install libpython3.{sys.version_info[1]}) "
                "or use a Python built with --enable-shared"
            )
        raise InstallationError(f"{stub}: {' '.join(ended.stderr.split())}; install the library it names")
