"""The logit log: sampling, size limit, readable after any end of the server, and no delay of responses."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from conftest import CLASSES, SIZE, Release, encode, picture

from serving.client.sync_client import Client
from serving.commands import main
from serving.server.arguments import logit_log_environment, parse_size
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError
from serving.triton import logit_log
from tests.support import logging_process
from tests.support.logging_process import batch, opened
from tests.support.stand_in import backend, counted, load, request, scrape

ROOT = Path(__file__).parents[3]


def tables(folder: Path) -> list[Any]:
    """Return the tables of the log, oldest file first."""
    return [pyarrow.parquet.ParquetFile(path).read() for path in logit_log.log_files(folder)]


def logits_of(folder: Path) -> np.ndarray:
    return np.concatenate([np.array(table["logits"].to_pylist(), dtype=np.float32) for table in tables(folder)])


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture
def logging_classifier(
    repository: Path,
    student: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """A classifier that logs into tmp_path/log with the given settings."""

    def made(**settings: str) -> Any:
        monkeypatch.setenv("TAILOR_LOGIT_LOG", str(tmp_path / "log"))
        for name, value in settings.items():
            monkeypatch.setenv(f"TAILOR_LOGIT_LOG_{name.upper()}", value)
        utilities = backend()

        class InferenceRequest:
            def __init__(self, inputs: list[Any], **_options: object) -> None:
                self.tensors = inputs

            def requested_output_names(self) -> list[str]:
                return ["logits"]

            def exec(self) -> Any:
                return student.execute([self])[0]

        utilities.InferenceRequest = InferenceRequest
        return load(repository, "classifier", "config.pbtxt", utilities)

    return made


def test_nothing_is_logged_unless_asked_for(classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    classifier.execute([request([picture(3)])])
    assert classifier.logit_log is None
    assert list(tmp_path.iterdir()) == []


def test_logits_are_those_before_any_prior_and_no_probe_is_among_them(
    logging_classifier: Callable[..., Any], release: Release, tmp_path: Path
) -> None:
    model = logging_classifier(share="1")
    golden = [picture(1), picture(2)]  # the golden images of conftest
    grey = encode(np.full((20, 20, 3), 128, dtype=np.uint8))
    model.execute(
        [
            request([picture(3), picture(4)], strength=[[1.0], [-2.0]]),
            request(golden, strength=[[0.0]] * 2),
            request([b"no image"]),
            request([grey, picture(5)], target_prior=[[0.96, 0.01, 0.01, 0.01, 0.01]] * 2),
        ]
    )
    model.finalize()
    np.testing.assert_array_equal(
        logits_of(tmp_path / "log"), release.logits([picture(seed) for seed in (3, 4, 5)]).astype(np.float32)
    )
    assert counted(model.metrics, "tailor_logit_log_total") == {(): 3}


def test_a_file_holds_times_and_logits_and_says_whose(
    logging_classifier: Callable[..., Any], release: Release, tmp_path: Path
) -> None:
    model = logging_classifier(share="1")
    before = time.time()
    model.execute([request([picture(3)])])
    model.finalize()
    [path] = (tmp_path / "log").iterdir()
    table = pyarrow.parquet.ParquetFile(path).read()
    assert table.column_names == ["time", "logits"]
    assert before - 1 < table["time"][0].as_py().timestamp() < time.time() + 1
    assert {key.decode(): value.decode() for key, value in table.schema.metadata.items()} == {
        "tailor_logits": "1",
        "version": "1",
        "student_sha256": release.manifest.files["student.onnx"],
        "classes_sha256": logit_log.classes_sha256(CLASSES),
    }
    content = path.read_bytes()
    assert b"an id" not in content and picture(3)[:20] not in content
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) & 0o007 == 0


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_each_image_is_drawn_with_the_share_asked_for(tmp_path: Path, share: float) -> None:
    log, counts = opened(tmp_path, share=share)
    for seed in range(100):
        log.offer(*batch(200, 5, seed))
    log.close()
    expected, spread = 20_000 * share, (20_000 * share * (1 - share)) ** 0.5
    assert abs(counts.logged - expected) < 5 * spread
    assert len(logits_of(tmp_path)) == counts.logged


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": "0"}, "TAILOR_LOGIT_LOG_SHARE is 0; expected a share above 0, at most 1"),
        ({"share": "1.5"}, "TAILOR_LOGIT_LOG_SHARE is 1.5"),
        ({"share": "nan"}, "TAILOR_LOGIT_LOG_SHARE is nan"),
        ({"share": "some"}, "TAILOR_LOGIT_LOG_SHARE is 'some'; expected a number"),
        ({"limit": "1000"}, "TAILOR_LOGIT_LOG_LIMIT is 1000; expected at least 1048576 bytes"),
        ({"limit": "1GiB"}, "TAILOR_LOGIT_LOG_LIMIT is '1GiB'; expected a number"),
    ],
)
def test_unusable_setting_fails_the_load_by_name(
    logging_classifier: Callable[..., Any], settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        logging_classifier(**settings)


def test_folder_that_is_none_and_a_missing_pyarrow_fail_the_load_in_words(
    logging_classifier: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").write_text("a file")
    with pytest.raises(ValueError, match=r"TAILOR_LOGIT_LOG: .*log: File exists"):
        logging_classifier()
    (tmp_path / "log").unlink()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="TAILOR_LOGIT_LOG is set, which needs pyarrow; install it"):
        logging_classifier()


def test_folder_never_exceeds_its_limit_and_the_oldest_go(tmp_path: Path) -> None:
    log, counts = opened(tmp_path, classes=500)
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "logits-00000000-0000000x.parquet").write_text("nor this")
    largest = 0
    for seed in range(40):
        log.offer(*batch(24, 500, seed))
        log.write()
        largest = max(largest, size_of(tmp_path))
    log.close()
    assert largest <= 1 << 20
    kept = logits_of(tmp_path)[:, 0]
    assert 0.6 * (1 << 20) < len(kept) * 2000 < 1.2 * (1 << 20)  # slightly compressed
    # The newest rows remain, without a gap.
    np.testing.assert_array_equal(kept, np.repeat(np.arange(40), 24)[-len(kept) :])
    assert counts.lost == {"queue": 0, "disk": 0}
    assert {path.name for path in tmp_path.iterdir()} >= {"notes.txt", "logits-00000000-0000000x.parquet"}


def test_clock_that_jumps_back_changes_nothing_of_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = opened(tmp_path, classes=500)
    for seed in range(30):
        monkeypatch.setattr(logit_log.time, "time", lambda seed=seed: 2e9 - 1e6 * seed)
        log.offer(*batch(24, 500, seed))
        log.write()
    log.close()
    kept = logits_of(tmp_path)[:, 0]
    np.testing.assert_array_equal(kept, np.repeat(np.arange(30), 24)[-len(kept) :])


def started(folder: Path, classes: int, batches: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(logging_process.__file__), folder, str(classes), str(batches)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    return process


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_files_that_can_be_read_and_the_next_cleans_up(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for _ in range(3):
        process, before = started(tmp_path, 500, 0), set(tmp_path.iterdir())
        while not {path for path in tmp_path.iterdir() if path.suffix == ".parquet"} - before:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.wait()
        assert size_of(tmp_path) <= 1 << 20
        assert len(logits_of(tmp_path)) > 0  # every file is complete
    (tmp_path / ".logits-00000001-aaaaaaaa.parquet.partial").write_bytes(b"half")
    log, _ = opened(tmp_path)
    log.offer(*batch(1, 5, 0))
    log.close()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_processes_that_share_a_folder_lose_nothing_and_keep_the_limit(tmp_path: Path) -> None:
    processes = [started(tmp_path, 5, 60) for _ in range(3)]
    largest = 0
    while any(process.poll() is None for process in processes):
        with logit_log.folder_lock(tmp_path):
            largest = max(largest, size_of(tmp_path))
        time.sleep(0.02)
    assert largest <= 1 << 20
    assert [process.stdout.read() for process in processes] == ["480 0 0\n"] * 3
    np.testing.assert_array_equal(np.sort(logits_of(tmp_path)[:, 0]), np.repeat(np.arange(60), 24))


def test_disk_that_hangs_costs_rows_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_log, "WRITE_EVERY", 0.01)
    monkeypatch.setattr(logit_log, "WAITING_BYTES", 100_000)
    log, counts = opened(tmp_path, classes=500)
    with logit_log.folder_lock(
        tmp_path
    ):  # only the writer thread waits for the lock; a blocked request would not return
        for seed in range(200):
            log.offer(*batch(8, 500, seed))
    log.close()
    assert counts.lost["queue"] > 1000
    assert counts.logged + counts.lost["queue"] == 1600


def test_full_disk_costs_rows_and_is_tried_again(tmp_path: Path) -> None:
    """Uses a file size limit instead of a small file system, which would need root."""
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from tests.support.logging_process import batch, opened\n"
        "log, counts = opened(Path(sys.argv[1]), classes=500)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "for seed in range(10): log.offer(*batch(8, 500, seed)); log.write()\n"
        "lost = counts.lost['disk']\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "log.close(); print(lost, counts.logged)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lost, logged = map(int, ended.stdout.split())
    assert lost == 64 and logged == 16  # two full files were lost; the third's rows were kept until space was available
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert len(logits_of(tmp_path)) == 16


def test_rows_of_a_file_that_grew_old_on_a_full_disk_are_counted_as_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_log, "WRITE_EVERY", 60)
    log, counts = opened(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(logit_log, "write_whole", full)
        log.offer(*batch(8, 5, 0))
        log.write()
        assert counts.lost["disk"] == 0  # retried
        patch.setattr(logit_log, "FILE_SECONDS", -1)
        log.write()
    log.close()
    assert (counts.lost["disk"], counts.logged, logit_log.log_files(tmp_path)) == (8, 0, [])


@pytest.mark.slow
def test_writing_imports_no_pandas_into_the_process_that_answers(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.support.logging_process import batch, opened\n"
        "log, counts = opened(Path(sys.argv[1])); log.offer(*batch(8, 5, 0)); log.write(); log.close()\n"
        "print(counts.logged, 'pandas' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, tmp_path]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "8 False\n"


def test_offers_from_many_threads_are_all_logged(tmp_path: Path) -> None:
    log, counts = opened(tmp_path)
    threads = [threading.Thread(target=lambda: [log.offer(*batch(2, 5, s)) for s in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert counts.logged == len(logits_of(tmp_path)) == 800


@pytest.mark.parametrize(
    ("text", "size"), [("1048576", 1 << 20), ("500MiB", 500 << 20), ("1 GiB", 1 << 30), ("2TiB", 2 << 40)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("share", "limit", "message"),
    [
        (0, "1GiB", "share of logged images is 0; expected a number above 0, at most 1"),
        (1.1, "1GiB", "share of logged images is 1.1"),
        (float("nan"), "1GiB", "share of logged images is nan"),
        (0.5, "1GB", "size is '1GB'; expected a number of bytes, or one with KiB, MiB, GiB or TiB"),
        (0.5, "10KiB", "limit of the logged logits is 10KiB; expected at least 1MiB"),
    ],
)
def test_unusable_option_of_serve_is_named(tmp_path: Path, share: float, limit: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        logit_log_environment(tmp_path / "log", share, limit)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: File exists; give a folder for the logged logits"):
        logit_log_environment(tmp_path / "file")


def test_serve_refuses_a_log_that_cannot_be_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for options, said in (
        (["--log-share", "2"], "share of logged images is 2; expected a number above 0, at most 1"),
        (["--log-limit", "much"], "size is 'much'; expected a number of bytes, or one with KiB, MiB, GiB or TiB"),
    ):
        assert main(["serve", "--log-logits", "logits", *options]) == 2
        assert capsys.readouterr().err == f"tailor: {said}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.end_to_end
def test_real_server_logs_what_it_was_asked_and_loses_none_at_its_end(
    repository: Path, release: Release, tmp_path: Path
) -> None:
    """Both instances, both protocols; start, golden requests, health check, stop."""
    root = shutil.copytree(repository, tmp_path / "repository")
    environment = logit_log_environment(tmp_path / "log", 1.0, "1MiB")
    with TritonServer(root, http_port=0, grpc_port=0, metrics_port=0, environment=environment) as server:
        with Client(server.http_url) as http, Client(server.grpc_url) as grpc:
            for client in (http, grpc):
                client.predict([picture(seed) for seed in range(3, 23)], "train")
            assert http.status().answers
        server.canary()
        time.sleep(2.5)
        lost = {name: count for name, count in scrape(server).items() if name.startswith("tailor_logit_log_lost_total")}
        assert len(lost) == 2 and not any(lost.values())
    found = logits_of(tmp_path / "log")
    expected = np.repeat(release.logits([picture(seed) for seed in range(3, 23)]), 2, axis=0)
    assert SIZE == 8 and found.shape == expected.shape
    np.testing.assert_allclose(np.sort(found[:, 0]), np.sort(expected[:, 0]), rtol=1e-4, atol=1e-5)
