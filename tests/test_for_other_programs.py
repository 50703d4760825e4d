"""Tailor in another program's environment: the client without PyTorch, and programs with a module `models`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from serving.shared.version import TAILOR_VERSION
from tests.support.documented import ROOT, blocks
from tests.support.requirements import tailor_with

# Packages that only training needs; each is in the closure of the extra `train`.
TRAINING = {"torch", "torchvision", "pyarrow", "pyyaml", "safetensors", "fsspec"}

# Contacts no server: tests only imports and types.
CLIENT = """
import sys
from tailor.client import Client, InputError, Prediction, ServingError

def answers(prior: str) -> list[Prediction]:
    with Client("http://127.0.0.1:9", timeout=1.0) as client:
        return client.predict([b"not sent"], prior=prior, check=False)

try:
    answers("no prior")
except InputError as error:
    assert isinstance(error, ServingError)
    print(error)
print({"models", "serving", "pipeline", "torch"} & {name.partition(".")[0] for name in sys.modules})
"""


def test_only_the_extra_train_installs_the_packages_of_training() -> None:
    for extra in ("client", "serve"):
        assert {"torch", "torchvision"}.isdisjoint(tailor_with(extra))
    assert TRAINING.isdisjoint(tailor_with("client"))
    assert {"numpy", "tritonclient", "typer"} <= tailor_with()
    for extra in ("train", "pipeline", "export", "ray"):
        assert tailor_with(extra) >= TRAINING


@pytest.mark.parametrize("module", ["serving.client.sync_client", "tailor.client"])
def test_the_client_imports_neither_torch_nor_the_pipeline(module: str, tmp_path: Path) -> None:
    tops = "{name.partition('.')[0] for name in sys.modules}"
    code = f"import sys, {module}; print({{'torch', 'pipeline', 'pyarrow'}} & {tops})"
    assert run_in(tmp_path, code, ROOT) == "set()"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel of this checkout, in the layout of site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("models", "pipeline", "serving", "tailor"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, folder / "source")
    (folder / "source/serving/shared/commit.txt").write_text("0123456789ab\n")  # as the Dockerfile records it
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"], check=True, timeout=300
    )
    [wheel] = folder.glob("*.whl")
    ZipFile(wheel).extractall(folder / "site-packages")
    return folder / "site-packages"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The folder of a program whose modules have the names of Tailor's."""
    for name in ("models", "pipeline", "serving"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('Tailor imported the {name}.py of the program')")
    return tmp_path


@pytest.mark.slow
def test_the_client_runs_and_type_checks_beside_modules_of_the_same_names(installed: Path, program: Path) -> None:
    message, imported = run_in(program, CLIENT, installed).splitlines()
    assert message.startswith("prior")
    assert imported == "set()"
    (program / "use.py").write_text(CLIENT + "answers(1)\nreveal_type(answers('train')[0].probabilities)\n")
    mypy = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", "--cache-dir", program / "cache"]
    ended = subprocess.run(
        [*mypy, "--strict", "use.py"], cwd=program, env={**os.environ, "MYPYPATH": str(installed)}, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    [error, revealed, _] = ended.stdout.splitlines()
    assert 'incompatible type "int"' in error
    assert "tuple[float, ...]" in revealed


@pytest.mark.slow
def test_the_example_of_the_losses_runs_beside_modules_of_the_same_names(installed: Path, program: Path) -> None:
    example = "\n".join(blocks(ROOT / "docs/losses.md", "python"))
    assert run_in(program, example, installed) == ""


def run_in(folder: Path, code: str, installed: Path) -> str:
    """Run a script of `folder` with `installed` as site-packages; return its output."""
    (folder / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_wheel_has_the_name_of_the_distribution_the_command_the_trigger_and_the_commit(installed: Path) -> None:
    [information] = installed.glob("*.dist-info")
    assert information.name == f"tailor_longtail-{TAILOR_VERSION}.dist-info"
    entries = (information / "entry_points.txt").read_text()
    assert "tailor = pipeline.commands.__main__:main" in entries and "[tailor.triggers]\nretrain = " in entries
    assert (
        run_in(installed, "from serving.shared.version import source_commit as s; print(s())", installed)
        == "0123456789ab"
    )
