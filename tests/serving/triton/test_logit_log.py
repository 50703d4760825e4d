"""The logit log of a served classifier: what is logged, sampling, settings and options."""

from __future__ import annotations

import re
import shutil
import stat
import sys
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
from serving.triton.storage import logit_log
from tests.support.logging_process import batch, logits_of, opened
from tests.support.stand_in import backend, counted, load, request, scrape


@pytest.fixture
def logging_classifier(
    repository: Path,
    student: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """A classifier that logs into tmp_path/log with the given settings."""

    def load_classifier(**settings: str) -> Any:
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

    return load_classifier


def test_logit_log_is_off_by_default(classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    classifier.execute([request([picture(3)])])
    assert classifier.logit_log is None
    assert list(tmp_path.iterdir()) == []


def test_logged_logits_are_those_before_any_prior_without_probes(
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


def test_a_file_has_times_logits_and_the_release_in_its_metadata(
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
def test_images_are_sampled_with_the_configured_share(tmp_path: Path, share: float) -> None:
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
def test_invalid_setting_fails_the_load_and_is_named(
    logging_classifier: Callable[..., Any], settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        logging_classifier(**settings)


def test_a_file_as_folder_and_a_missing_pyarrow_fail_the_load(
    logging_classifier: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").write_text("a file")
    with pytest.raises(ValueError, match=r"TAILOR_LOGIT_LOG: .*log: File exists"):
        logging_classifier()
    (tmp_path / "log").unlink()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="TAILOR_LOGIT_LOG is set, which needs pyarrow; install it"):
        logging_classifier()


@pytest.mark.parametrize(
    ("text", "size"), [("1048576", 1 << 20), ("500MiB", 500 << 20), ("1 GiB", 1 << 30), ("2TiB", 2 << 40)]
)
def test_sizes_are_parsed(text: str, size: int) -> None:
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
def test_invalid_option_of_serve_is_named(tmp_path: Path, share: float, limit: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        logit_log_environment(tmp_path / "log", share, limit)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: File exists; give a folder for the logged logits"):
        logit_log_environment(tmp_path / "file")


def test_serve_rejects_an_invalid_log_option_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for options, message in (
        (["--log-share", "2"], "share of logged images is 2; expected a number above 0, at most 1"),
        (["--log-limit", "much"], "size is 'much'; expected a number of bytes, or one with KiB, MiB, GiB or TiB"),
    ):
        assert main(["serve", "--log-logits", "logits", *options]) == 2
        assert capsys.readouterr().err == f"tailor: {message}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.end_to_end
def test_real_server_logs_every_request_and_loses_none_at_its_end(
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
    logged = logits_of(tmp_path / "log")
    expected = np.repeat(release.logits([picture(seed) for seed in range(3, 23)]), 2, axis=0)
    assert SIZE == 8 and logged.shape == expected.shape
    np.testing.assert_allclose(np.sort(logged[:, 0]), np.sort(expected[:, 0]), rtol=1e-4, atol=1e-5)
