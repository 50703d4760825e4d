"""Check of the local server's installation: messages for missing parts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ADMIN_KEY

from serving.server import installation
from serving.server.installation import InstallationError, child_environment, find_installation


def test_environment_of_the_stubs_is_this_interpreters() -> None:
    environment = find_installation().environment
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize("name", ["TAILOR_ADMIN_KEY", "TAILOR_SIGNING_KEY", "TAILOR_SIGNING_PASSPHRASE"])
def test_the_server_and_its_models_get_no_secret_of_the_caller(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, ADMIN_KEY)
    monkeypatch.setenv("TAILOR_OTHER", "kept")
    environment = child_environment()
    assert environment["TAILOR_OTHER"] == "kept"
    assert ADMIN_KEY not in environment.values()


def test_python_without_stubs_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.sys, "version_info", (3, 13, 0))
    with pytest.raises(InstallationError, match=r"needs Python 3\.11 or 3\.12, this is 3\.13"):
        find_installation()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytriton" else find(name))
    with pytest.raises(InstallationError, match=r"nvidia-pytriton.* is missing; run `pip install -e '\.\[serve\]'`"):
        find_installation()


def test_numpy_2_is_refused_because_it_breaks_the_stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "2.3.1")
    with pytest.raises(
        InstallationError, match=r"numpy 2\.3\.1 breaks this Triton's Python stubs; pip install 'numpy<2'"
    ):
        find_installation()


def test_missing_libpython_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"stub: error while loading shared libraries: libpython3.{sys.version_info[1]}.so.1.0: cannot open"
    ended = subprocess.CompletedProcess([], 127, "", said)
    monkeypatch.setattr(installation.subprocess, "run", lambda *_arguments, **_options: ended)
    with pytest.raises(
        InstallationError, match=r"libpython3\.\d+\.so\.1\.0 is missing; install it \(Debian: apt install"
    ):
        find_installation()
