"""A stage's command line: a one-line error and an exit code for user errors, a traceback on request."""

import errno
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.command_line import stage_main
from pipeline.shared.errors import DataError, ParamsError, StageError
from serving.shared.errors import RepositoryError
from tests.support.making import ROOT, content, folder, write


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(content()))
    return path


def stage(recipe, error=None, *more):
    def run(params):
        if error:
            raise error
        return f"seed {params.seed}"

    return stage_main(run, "A stage.", ["--params", str(recipe), *more])


def test_a_successful_stage_prints_its_summary(recipe, capsys):
    assert stage(recipe) == 0
    printed = capsys.readouterr()
    assert printed.out == "test_stage: seed 0\n" and printed.err == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ParamsError("data.seed is -1; expected more"), 2, "data.seed is -1; expected more"),
        (DataError("a.png: is empty"), 1, "a.png: is empty"),
        (StageError("first line\nsecond line"), 1, "first line second line"),
        (RepositoryError("student/config.pbtxt: is missing"), 1, "student/config.pbtxt: is missing"),
        (
            OSError(errno.ENOSPC, "No space left on device", "artifacts/x"),
            1,
            "artifacts/x: No space left on device",
        ),
        (KeyboardInterrupt(), 130, "interrupted; the same command runs it again"),
    ],
)
def test_a_failed_stage_prints_one_line_and_returns_its_exit_code(recipe, capsys, error, code, message):
    assert stage(recipe, error) == code
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"test_stage: {message}\n"


def test_debug_shows_the_traceback(recipe):
    with pytest.raises(DataError, match="no good"):
        stage(recipe, DataError("no good"), "--debug")


def test_a_mistake_in_the_program_is_not_hidden(recipe):
    with pytest.raises(ZeroDivisionError):
        stage(recipe, ZeroDivisionError())


def test_an_unusable_recipe_is_misuse(tmp_path, capsys):
    assert stage(tmp_path / "nowhere.yaml") == 2
    assert "nowhere.yaml: No such file or directory" in capsys.readouterr().err


@pytest.mark.slow
def test_a_100_megapixel_image_leaves_one_line_and_nothing_else(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    root = folder(tmp_path / "source", {"a": 4, "b": 4})
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0))
    write(
        root / "a/huge.png", b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )
    settings = {"source": "folder", "location": str(root), "test_per_class": 1, "profile": "natural"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content({f"data.{k}": v for k, v in settings.items()})))
    command = [sys.executable, "-m", "pipeline.split", "--params", str(tmp_path / "params.yaml")]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"split: {root}/a/huge.png: has 10000x10000 = 100000000 pixels, above the limit of 50000000; "
        "replace the image or remove it\n"
    )
    assert not (tmp_path / "data/split").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("stage", ["teacher", None], ids=["under dvc", "by hand"])
def test_a_stage_whose_dvc_exited_during_its_imports_ends_and_one_started_by_hand_continues(tmp_path, stage):
    code = """
import os, sys, time
from pipeline.command_line import end_with_dvc
parent = os.getppid()
print(os.getpid(), flush=True)
while os.getppid() == parent:
    time.sleep(0.05)
end_with_dvc("teacher")
time.sleep(8)
print("continued", flush=True)
"""
    (tmp_path / "stage.py").write_text(code)
    # The shell has none of DVC's variables, and exits after the stage has printed its id.
    variable = f"DVC_STAGE={stage}" if stage else ""
    shell = f"{variable} {sys.executable} stage.py >out 2>&1 & until [ -s out ]; do sleep 0.1; done"
    environment = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"} | {"PYTHONPATH": str(ROOT)}
    subprocess.run(["sh", "-c", shell], cwd=tmp_path, env=environment, check=True, timeout=60)
    process = int((tmp_path / "out").read_text().split()[0])
    deadline = time.monotonic() + 60
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    printed = (tmp_path / "out").read_text()
    assert ("has exited; `dvc repro` resumes it" in printed) == bool(stage)
    assert ("continued" in printed) == (stage is None)


@pytest.mark.parametrize("name", ["split", "prior"])
def test_help_shows_an_example_that_can_be_typed(name):
    command = [sys.executable, "-m", f"pipeline.{name}", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"example: python -m pipeline.{name}" in shown
