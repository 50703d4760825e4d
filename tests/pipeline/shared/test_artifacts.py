"""Atomic writes: a file is complete or absent after an exception, on a full disk, and after a kill."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from pipeline.shared.artifacts import sha256_of_json, whole_folder, write_file, write_json
from tests.support.making import ROOT

# A process with a file size limit of 64 KiB: beyond it the operating system fails the write.
LIMITED = """
import resource, sys
from pathlib import Path
from pipeline.shared.artifacts import whole_folder, write_file
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
target = Path(sys.argv[1])
"""


def run_python(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_replaces_the_old_one_atomically(tmp_path):
    for content in ("old", "new"):
        with whole_folder(tmp_path / "deep/out") as folder:
            assert names(folder) == []
            write_file(folder / f"{content}.txt", content)
            (folder / "inner").mkdir()
            write_json(folder / "inner/value.json", {"ä": 1})
    assert names(tmp_path / "deep") == ["out"] and names(tmp_path / "deep/out") == ["inner", "new.txt"]
    assert json.loads((tmp_path / "deep/out/inner/value.json").read_text(encoding="utf-8")) == {"ä": 1}


def test_a_link_to_a_folder_stays_and_its_folder_is_replaced(tmp_path):
    (tmp_path / "disk/out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    for content in ("old", "new"):
        with whole_folder(tmp_path / "out") as folder:
            write_file(folder / content, content)
    assert (tmp_path / "out").is_symlink() and names(tmp_path / "disk") == ["out"]
    assert names(tmp_path / "disk/out") == ["new"]


@pytest.mark.parametrize("target", ["out", ".out.old", ".out.partial"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_a_dead_link_in_the_place_of_a_folder_is_replaced(tmp_path, target, kind):
    path = tmp_path / target
    path.write_text("a file") if kind == "file" else path.symlink_to("nowhere")
    for content in ("old", "new"):
        with whole_folder(tmp_path / "out") as folder:
            write_file(folder / content, content)
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_only_the_old_folder(tmp_path, error):
    with whole_folder(tmp_path / "out") as folder:
        write_file(folder / "kept.txt", "kept")

    def fail():
        with whole_folder(tmp_path / "out") as folder:
            write_file(folder / "half.txt", "half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["kept.txt"]


def test_an_exception_without_an_old_folder_leaves_nothing(tmp_path):
    def fail():
        with whole_folder(tmp_path / "out") as folder:
            write_file(folder / "half.txt", "half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == []


def test_a_full_disk_keeps_the_old_file_and_the_error_names_it(tmp_path):
    path = tmp_path / "weights.bin"
    write_file(path, b"old")
    # The partial file is on a device that is always full: the write fails with the kernel's ENOSPC.
    (tmp_path / ".weights.bin.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_file(path, b"x" * 100_000)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["weights.bin"]


def test_a_write_above_the_size_limit_keeps_the_old_file(tmp_path):
    path = tmp_path / "weights.bin"
    write_file(path, b"old")
    done = run_python(LIMITED + "write_file(target, bytes(10**6))", path)
    assert done.returncode == 1 and f"File too large: '{path}'" in done.stderr
    assert path.read_bytes() == b"old" and names(tmp_path) == ["weights.bin"]


def test_a_failed_write_keeps_the_old_folder(tmp_path):
    with whole_folder(tmp_path / "out") as folder:
        write_file(folder / "table.parquet", "old")
    program = LIMITED + (
        "import numpy as np, pyarrow as pa, pyarrow.parquet\n"
        "with whole_folder(target) as folder:\n"
        "    write_file(folder / 'small.txt', 'new')\n"
        "    pyarrow.parquet.write_table(pa.table({'x': np.random.rand(10**5)}), folder / 'table.parquet')\n"
    )
    done = run_python(program, tmp_path / "out")
    assert done.returncode == 1 and "File too large" in done.stderr
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["table.parquet"]
    assert (tmp_path / "out/table.parquet").read_text() == "old"


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from pipeline.shared.artifacts import whole_folder, write_file
with whole_folder(Path(sys.argv[1])) as folder:
    write_file(folder / "half.txt", "half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED_BETWEEN_THE_RENAMES = """
import os, signal, sys
from pathlib import Path
from pipeline.shared.artifacts import whole_folder, write_file
renames = 0
def watch(event, arguments):
    global renames
    if event == "os.rename":
        renames += 1
        if renames == 3:  # of the file, of the old folder, of the new folder
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
with whole_folder(Path(sys.argv[1])) as folder:
    write_file(folder / "new.txt", "new")
"""
NEXT = """
import sys
from pathlib import Path
from pipeline.shared.artifacts import whole_folder, write_file
with whole_folder(Path(sys.argv[1])) as folder:
    {body}
"""


@pytest.mark.parametrize("old_exists", [True, False])
def test_a_killed_writer_leaves_the_old_folder_and_the_next_run_succeeds(tmp_path, old_exists):
    output = tmp_path / "out"
    if old_exists:
        with whole_folder(output) as folder:
            write_file(folder / "old.txt", "old")
    assert run_python(KILLED_WHILE_WRITING, output).returncode == -signal.SIGKILL
    assert (names(output) == ["old.txt"]) if old_exists else not output.exists()
    with whole_folder(output) as folder:
        write_file(folder / "new.txt", "new")
    assert names(tmp_path) == ["out"] and names(output) == ["new.txt"]


@pytest.mark.parametrize(
    ("body", "name"), [("write_file(folder / 'next.txt', 'next')", "next.txt"), ("raise ValueError", "old.txt")]
)
def test_a_writer_killed_between_its_renames_loses_nothing(tmp_path, body, name):
    output = tmp_path / "out"
    with whole_folder(output) as folder:
        write_file(folder / "old.txt", "old")
    assert run_python(KILLED_BETWEEN_THE_RENAMES, output).returncode == -signal.SIGKILL
    assert not output.exists() and names(tmp_path / ".out.old") == ["old.txt"]
    # The next run restores the old output, even when that run fails too.
    run_python(NEXT.format(body=body), output)
    assert names(tmp_path) == ["out"] and names(output) == [name]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, "old")
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom pipeline.shared import artifacts\n"
        "sys.addaudithook(lambda event, _: os.kill(os.getpid(), signal.SIGKILL) if event == 'os.rename' else None)\n"
        "artifacts.write_json(Path(sys.argv[1]), 'new')\n"
    )
    assert run_python(program, path).returncode == -signal.SIGKILL
    assert json.loads(path.read_text()) == "old"
    write_json(path, "newer")
    assert json.loads(path.read_text()) == "newer" and names(tmp_path) == ["value.json"]


def test_nan_is_refused_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, 1.0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    assert path.read_text() == "1.0\n"


def test_the_hash_of_content_is_independent_of_key_order():
    assert sha256_of_json({"a": 1, "b": [1, 2]}) == sha256_of_json({"b": [1, 2], "a": 1})
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": 2})


def test_the_error_names_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists") as caught:
        write_file(tmp_path / "file/inner.txt", "x")
    assert os.fspath(tmp_path / "file") in str(caught.value)
