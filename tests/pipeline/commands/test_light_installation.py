"""`tailor` on the base installation, without torch, PyYAML, DVC and Prefect; and the exit status of errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.commands.app import app, main
from serving.shared.errors import ServingError, install_command
from tests.support.making import ROOT
from tests.support.requirements import tailor_with

pytestmark = pytest.mark.slow

# Hides packages that Tailor without extras does not install, runs a command, and lists the imported modules.
LIGHT = """
import importlib.abc, importlib.metadata, json, re, sys
allowed = set(json.loads(sys.argv[1])) | {"setuptools"}
owners = importlib.metadata.packages_distributions()
names = {top: {re.sub(r"[-_.]+", "-", name).lower() for name in by} for top, by in owners.items()}
hidden = {top for top, by in names.items() if not by & allowed} - {"models", "pipeline", "serving", "tailor"}
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
assert {"torch", "yaml", "pyarrow", "dvc", "prefect"} <= hidden
from pipeline.commands.app import main
status = main(sys.argv[2:])
assert not {"torch", "yaml", "pyarrow", "dvc", "prefect"} & set(sys.modules)
sys.exit(status)
"""


def run_light(*arguments: str, cwd=ROOT) -> subprocess.CompletedProcess[str]:
    """Run `tailor` in a process with only the packages of the base installation."""
    base = json.dumps(sorted(tailor_with()))
    return subprocess.run(
        [sys.executable, "-c", LIGHT, base, *arguments],
        cwd=cwd, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_the_base_installation_lists_every_command_and_prints_the_help_of_each() -> None:
    done = run_light("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("predict", "serve", "compare", "retrain", "ray-train"):
        assert f"  {name} " in done.stdout
    assert "Example: tailor compare main ." in run_light("compare", "--help").stdout


@pytest.mark.parametrize(
    ("command", "package"),
    [("memory", "safetensors"), ("recipe recipes/cifar100-if100-200.yaml", "yaml"), ("doctor", "yaml")],
)
def test_a_command_names_its_missing_package_in_one_line(command: str, package: str) -> None:
    done = run_light(*command.split())
    assert (done.returncode, done.stdout) == (1, "")
    needs = f"needs the package {package}, which is not installed; {install_command('pipeline')}"
    assert done.stderr == f"tailor: {command.split()[0]} {needs}\n"


def test_ctrl_c_during_the_imports_ends_in_one_line() -> None:
    code = (
        "import sys\nfrom pipeline.commands.__main__ import main\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'serving.commands.app': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\nsys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "tailor: interrupted\n")


def test_help_imports_no_large_package() -> None:
    code = (
        "import sys\nfrom pipeline.commands.app import main\nmain(['--help'])\n"
        "assert not {'torch', 'pyarrow', 'prefect', 'dvc', 'scipy', 'yaml'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=120)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ServingError("no server"), 1, "tailor: no server\n"),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), 1, "tailor: a.yaml: No such file or directory\n"),
    ],
)
def test_an_error_of_the_user_is_one_line_with_its_status(capsys, failing, error, status, line) -> None:
    failing.append(error)
    assert main(["fail"]) == status
    assert capsys.readouterr().err == line
    assert main(["fail", "--debug"]) == status
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), ModuleNotFoundError("pipeline.nowhere", name="pipeline.nowhere")]
)
def test_an_internal_error_is_raised(failing, error) -> None:
    failing.append(error)
    with pytest.raises(type(error), match=str(error)):
        main(["fail"])


@pytest.fixture
def failing():
    """A list with one error, which the test command `tailor fail` raises."""
    errors: list[Exception] = []

    def fail(debug: bool = False) -> None:  # noqa: ARG001
        raise errors[0]

    app.command("fail", rich_help_panel="Operate")(fail)
    yield errors
    app.registered_commands.pop()
