"""Images whose answer is `unknown` are kept as files: only where an operator wants it, within limits, without probes."""

from __future__ import annotations

import base64
import hashlib
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Release, encode, picture
from test_extras import KEYS, asked, written

from serving.commands.app import main
from serving.server.arguments import unknown_images_environment
from serving.shared.errors import InputError
from serving.triton.storage import folder_files, unknown_images
from tests.support.stand_in import counted, request


class Counts(dict):
    """Stands for Metrics."""

    def count(self, family: str, number: int = 1, **labels: str) -> None:
        key = (family, *labels.values())
        self[key] = self.get(key, 0) + number


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, Path]:
    return written(tmp_path_factory.mktemp("unknown"), **KEYS)


@pytest.fixture
def repository(made: tuple[Release, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, value in unknown_images_environment(tmp_path / "kept", "1MiB").items():
        monkeypatch.setenv(name, value)
    yield made[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_unknown_images_are_kept_unchanged_once_and_without_probes(classifier: Any, tmp_path: Path) -> None:
    images = [picture(seed) for seed in range(30)]
    grey = encode(np.full((8, 8, 3), 128, dtype=np.uint8))
    url = b"data:image/png;base64," + base64.b64encode(images[7])
    sent = [*images, grey, url]
    [answer] = [classifier.execute([asked(images, false_alarms=[[0.3]] * len(images))])[0]]
    unknown = answer["unknown"][:, 0]
    assert unknown.any() and not unknown.all()
    classifier.execute([asked([image], false_alarms=[[0.3]]) for image in sent])
    classifier.execute([request(images)])  # without `unknown` in the answer
    classifier.finalize()
    probes = {picture(1), picture(2)}  # the golden images of conftest
    expected = {image for image, alarm in zip(images, unknown, strict=True) if alarm} - probes
    kept = {path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert kept == expected and grey not in kept
    assert names(tmp_path / "kept") == sorted(f"{hashlib.sha256(image).hexdigest()[:32]}.png" for image in expected)
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) & 0o007 == 0
    assert counted(classifier.metrics, "tailor_unknown_kept_total") == {(): len(expected)}
    lost = counted(
        classifier.metrics, "tailor_unknown_lost_total"
    )  # each reason from 0, so that the alert sees the first
    assert lost == {("queue",): 0, ("size",): 0, ("disk",): 0}


def test_without_a_folder_nothing_is_kept() -> None:
    assert unknown_images.open_unknown_images({}, Counts(), folder_files) is None


def test_the_newest_images_are_kept_within_number_and_bytes_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("of the operator")
    counts = Counts()
    store = unknown_images.UnknownImages(tmp_path, 1000, [], counts, folder_files, write_every=60, most=3)
    for number in range(5):
        store.offer([bytes([0xFF, 0xD8, number]) * 10])
        store.write()
        for path in unknown_images.unknown_files(tmp_path):  # distinct times, also on a coarse clock
            os.utime(path, ns=(path.stat().st_mtime_ns - 10**9,) * 2)
    assert {path.read_bytes()[2] for path in unknown_images.unknown_files(tmp_path)} == {2, 3, 4}
    store.offer([b"\x89PNG" * 245, b"x" * 1001])
    store.write()
    assert [path.suffix for path in unknown_images.unknown_files(tmp_path)] == [".png"]
    assert (tmp_path / "note.txt").exists()
    assert counts == {("tailor_unknown_kept_total",): 6, ("tailor_unknown_lost_total", "size"): 1}
    store.close()


def test_a_full_queue_and_a_lost_folder_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unknown_images, "QUEUE_BYTES", 50)
    counts, folder = Counts(), tmp_path / "kept"
    store = unknown_images.UnknownImages(folder, 1 << 20, [], counts, folder_files, write_every=60)
    store.offer([b"a" * 40, b"b" * 40])
    folder.rmdir()
    store.write()
    assert counts == {("tailor_unknown_lost_total", "queue"): 1, ("tailor_unknown_lost_total", "disk"): 1}
    store.close()


def test_an_image_that_an_operator_moves_away_meanwhile_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, listed = Counts(), unknown_images.unknown_files
    store = unknown_images.UnknownImages(tmp_path, 40, [], counts, folder_files, write_every=60)
    store.offer([b"a" * 20, b"b" * 20])
    store.write()

    def listed_before_the_move(folder: Path) -> list[Path]:
        files = listed(folder)
        files[0].unlink()
        return files

    monkeypatch.setattr(unknown_images, "unknown_files", listed_before_the_move)
    store.offer([b"c" * 20])
    store.write()
    assert counts == {("tailor_unknown_kept_total",): 3} and len(listed(tmp_path)) == 2
    store.close()


def test_a_full_disk_keeps_the_old_images_and_counts_the_new_ones_as_lost(tmp_path: Path) -> None:
    """Uses a file size limit instead of a small file system, which would need root."""
    counts = Counts()
    store = unknown_images.UnknownImages(tmp_path, 4000, [], counts, folder_files, write_every=60)
    store.offer([b"a" * 1900, b"b" * 1900])
    store.write()
    old = names(tmp_path)
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, previous[1]))
    try:
        store.offer([b"c" * 1900, b"d" * 1900])
        store.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    assert names(tmp_path) == old
    assert counts == {("tailor_unknown_kept_total",): 2, ("tailor_unknown_lost_total", "disk"): 2}
    store.offer([b"e" * 1900])
    store.write()
    assert len(names(tmp_path)) == 2 and counts["tailor_unknown_kept_total",] == 3
    store.close()


def test_the_partial_file_of_a_killed_process_is_deleted(tmp_path: Path) -> None:
    left = tmp_path / f".{unknown_images.unknown_name(b'killed')}.partial"
    own = tmp_path / ".notes.partial"
    for path in (left, own):
        path.write_bytes(b"x")
    store = unknown_images.UnknownImages(tmp_path, 1 << 20, [], Counts(), folder_files, write_every=60)
    store.offer([b"next"])
    store.write()
    assert names(tmp_path) == sorted([own.name, unknown_images.unknown_name(b"next")])
    store.close()


def test_an_unusable_folder_or_limit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: File exists; give a folder for the unknown images"):
        unknown_images_environment(tmp_path / "file")
    with pytest.raises(InputError, match="limit of the unknown images is 10; expected at least 1MiB"):
        unknown_images_environment(tmp_path / "kept", 10)
    assert main(["serve", "--keep-unknown", str(tmp_path / "kept"), "--keep-limit", "much"]) == 2
    assert "size is 'much'" in capsys.readouterr().err
