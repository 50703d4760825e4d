"""The classifier's metrics and log: priors, classes, confidence, rejected requests; no image content."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, picture

import serving.triton
from serving.client.sync_client import Client
from serving.repository.writer import write_repository
from serving.server.triton_server import TritonServer
from serving.transport.sync_transport import RequestRejected, Transport
from tests.support.segmentation_release import write_segmentation_export
from tests.support.stand_in import backend, counted, load, request, scrape

FOLDER = Path(serving.triton.__file__).parent


def import_from_file(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"tried_{Path(name).name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", backend())
        spec.loader.exec_module(module)
    return module


def test_every_image_is_counted_under_its_requested_prior(classifier: Any) -> None:
    one = [picture(1)]
    classifier.execute(
        [
            request(one, strength=[[0.0]]),
            request(one, strength=[[-0.0]]),
            request(one * 3, strength=[[1.0], [0.3], [0.0]]),
            request(one * 2, target_prior=[[0.2] * 5] * 2),
            request(one),  # the manifest's default is 0.5
            request([b""], strength=[[0.0]]),
        ]
    )
    images = counted(classifier.metrics, "tailor_images_total")
    assert images == {("balanced",): 3, ("train",): 1, ("live",): 0, ("number",): 2, ("own",): 2}
    assert sum(counted(classifier.metrics, "tailor_top_class_total").values()) == 8
    assert counted(classifier.metrics, "tailor_confidence_count") == {(): 8}


def test_rejected_requests_are_counted_by_reason(classifier: Any) -> None:
    one = [picture(1)]
    classifier.execute(
        [
            request([b""]),
            request([b"text"]),
            request([picture(1)[:60]]),
            request(one, strength=[[np.nan]]),
            request(one, target_prior=[[2, 0, 0, 0, 0]]),
            request(one, target_prior=[[0.2] * 5], strength=[[0.0]]),
        ]
    )
    assert counted(classifier.metrics, "tailor_refused_total") == {
        (reason,): 1 for reason in ("image_empty", "image_format", "image_damaged", "strength", "target_prior", "both")
    }


def test_requests_that_the_student_fails_are_counted_separately(classifier: Any, student: Any) -> None:
    error = types.SimpleNamespace(message=lambda: "out of memory")
    failed = types.SimpleNamespace(has_error=lambda: True, error=lambda: error)
    student.execute = lambda _requests: [failed]
    classifier.execute([request([picture(1)]), request([picture(2)]), request([b""])])
    assert counted(classifier.metrics, "tailor_failed_total") == {(): 2}
    assert sum(counted(classifier.metrics, "tailor_images_total").values()) == 0


def test_confidence_buckets_are_cumulative() -> None:
    metrics = import_from_file("metrics").Metrics(1, ["a", "b"], ["many", "few"], [0, 1])
    metrics.count_images({"balanced": 3}, np.array([0, 1, 1]), np.array([0.05, 0.1, 0.95]))
    buckets = {labels[0]: value for labels, value in counted(metrics, "tailor_confidence_bucket").items()}
    assert [buckets[edge] for edge in ("0.1", "0.2", "0.9", "1.0", "+Inf")] == [2, 2, 2, 3, 3]
    assert counted(metrics, "tailor_confidence_sum")[()] == pytest.approx(1.1)
    assert counted(metrics, "tailor_top_class_total") == {("a", "many"): 1, ("b", "few"): 2}
    metrics.close()


def test_the_groups_of_class_maps_are_terciles_of_their_pixels(tmp_path: Path) -> None:
    write_segmentation_export(tmp_path / "export")  # 9,000, 900 and 100 pixels
    repository = write_repository(tmp_path / "export", tmp_path / "repository")
    segmenter = load(repository, "segmenter", "configs/local.pbtxt", backend())
    assert [labels["group"] for labels in segmenter.metrics.class_labels] == ["many", "medium", "few"]
    segmenter.finalize()


@pytest.mark.parametrize("classes", [101, 1000, 8142])
def test_many_classes_share_100_labels_by_their_rank(classes: int) -> None:
    ranks = np.random.default_rng(0).permutation(classes)
    labels = import_from_file("metrics").class_labels([str(index) for index in range(classes)], ranks)
    assert len(set(labels)) == 100
    for index in range(classes):
        first, last = map(int, re.fullmatch(r"rank (\d+)-(\d+)", labels[index]).groups())
        assert first <= ranks[index] + 1 <= last


def test_close_passes_the_last_counts_to_triton() -> None:
    metrics = import_from_file("metrics").Metrics(1, ["a"], ["many"], [0])
    metrics.count("tailor_refused_total", reason="image_empty")
    metrics.close()
    assert not metrics.thread.is_alive()
    assert next(iter(metrics.families["tailor_refused_total"].metrics.values())).value == 1


def open_access_log(folder: Path, lost: list[int] | None = None, **limits: int) -> Any:
    module = import_from_file("storage/access_log")
    return module.AccessLog(folder, "classifier_0_0_version_1", lambda: lost.append(1), **limits)


def test_access_log_is_off_by_default(classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    classifier.execute([request([picture(1)])])
    assert classifier.access_log is None
    assert list(tmp_path.iterdir()) == []


def test_access_log_line_describes_the_request_without_image_data(tmp_path: Path) -> None:
    log = open_access_log(tmp_path / "log")
    log.write('id "quoted"\n' + "x" * 1000, time.monotonic(), 2, 1234, "train", "ok")
    log.close()
    lines = (tmp_path / "log" / "classifier_0_0_version_1.jsonl").read_text().splitlines()
    entry = json.loads(lines[0])
    assert len(lines) == 1
    assert list(entry) == ["time", "request", "images", "bytes", "prior", "outcome", "milliseconds"]
    assert entry["request"] == ('id "quoted"\n' + "x" * 1000)[:64]
    assert (entry["images"], entry["bytes"], entry["prior"], entry["outcome"]) == (2, 1234, "train", "ok")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])


def test_every_request_of_a_batch_has_an_access_log_line(classifier: Any, tmp_path: Path) -> None:
    classifier.access_log = open_access_log(tmp_path)
    two = [picture(1)] * 2
    classifier.execute([request(two, strength=[[0.0], [1.0]]), request([b"text"]), request(two, strength=[[1.0]] * 2)])
    text = (tmp_path / "classifier_0_0_version_1.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["images"], line["prior"], line["outcome"]) for line in lines] == [
        (2, "mixed", "ok"),
        (1, None, "image_format"),
        (2, "train", "ok"),
    ]
    assert lines[0]["bytes"] == 2 * len(picture(1))


def test_access_log_files_have_bounded_sizes(tmp_path: Path) -> None:
    log = open_access_log(tmp_path, max_bytes=2000, backups=2)
    for _ in range(500):
        log.write("id", time.monotonic(), 1, 10, "balanced", "ok")
    log.close()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 3
    assert max(sizes) <= 2000


def test_full_disk_loses_lines_but_no_request(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lost: list[int] = []
    (tmp_path / "classifier_0_0_version_1.jsonl").symlink_to("/dev/full")
    log = open_access_log(tmp_path, lost)
    for _ in range(3):
        log.write("id", time.monotonic(), 1, 10, "balanced", "ok")
    assert len(lost) == 3
    assert capfd.readouterr().err == ""


@pytest.mark.end_to_end
def test_real_server_shows_the_counts_of_both_instances(server: TritonServer) -> None:
    def total(family: str) -> float:
        return sum(value for name, value in scrape(server).items() if name.startswith(family))

    names = ('tailor_images_total{prior="own"', 'tailor_refused_total{reason="image_format"', "tailor_top_class_total")
    time.sleep(2.5)  # until requests of earlier tests are counted
    before = [total(name) for name in names]
    with Client(server.grpc_url) as client:
        for seed in range(10):
            client.predict([picture(seed)] * 2, [0.2] * len(CLASSES))
    transport = Transport(server.http_url, timeout=10)
    with pytest.raises(RequestRejected):
        transport.infer("classifier", {"image": np.array([[b"text"]], dtype=np.object_)}, {"index": 0})
    transport.close()
    deadline = time.monotonic() + 10
    while (now := [total(name) for name in names]) < [b + n for b, n in zip(before, (20, 1, 20), strict=True)]:
        assert time.monotonic() < deadline, (before, now)
        time.sleep(0.2)
    assert now == [before[0] + 20, before[1] + 1, before[2] + 20]
    groups = {re.search(r'group="(\w+)"', name).group(1) for name in scrape(server) if name.startswith(names[2])}
    assert groups <= {"many", "medium", "few"}
