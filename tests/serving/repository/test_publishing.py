"""Publishing further releases into a repository; the version policy; older manifests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Release, write_export
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from serving.repository import release as releases
from serving.repository import writer as repositories
from serving.repository.manifest import MANIFEST_NAME
from serving.repository.version_policy import serve_versions, served_versions
from serving.repository.writer import publish, write_repository
from serving.shared.errors import RepositoryError


def parse(path: Path) -> ModelConfig:
    return text_format.Parse(path.read_text(), ModelConfig())


def test_published_release_gets_the_next_version_and_no_server_loads_it(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    write_export(tmp_path / "export", version=7)
    assert publish(tmp_path / "export", root) == 2
    assert publish(tmp_path / "export", root) == 2  # already published
    found = releases.read_release(root, 2)
    assert found.manifest.version == 2
    assert releases.published_versions(root) == [1, 2]
    assert [one.version for one in releases.find_releases(root)] == [1]


def test_publishing_that_is_interrupted_leaves_no_version(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    write_export(tmp_path / "export", version=2)

    copy = shutil.copyfile

    def copy_student_files(source: Path, target: Path) -> object:
        if "classifier" in str(target):
            raise KeyboardInterrupt
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy_student_files)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "export", root)
    assert releases.published_versions(root) == [1]
    monkeypatch.undo()
    assert publish(tmp_path / "export", root) == 3  # a number is never used twice
    assert releases.published_versions(root) == [1, 3]


def test_release_with_other_classes_cannot_join_a_repository(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    write_export(tmp_path / "export", version=2)
    manifest = json.loads((tmp_path / "export" / MANIFEST_NAME).read_text())
    manifest["classes"][0] = "asp"
    (tmp_path / "export" / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(RepositoryError, match=r"has other classes than .*labels\.txt; write a repository of its own"):
        publish(tmp_path / "export", root)
    manifest["classes"][0], manifest["top_k"] = "ant", 2
    (tmp_path / "export" / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(RepositoryError, match=r"classifier has class \[2\], but .* has class \[3\]"):
        publish(tmp_path / "export", root)
    assert releases.published_versions(root) == [1]


def test_policy_change_keeps_manual_settings(repository: Path, release: Release, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    path = root / "classifier" / "config.pbtxt"
    path.write_text(path.read_text().replace("count: 2", "count: 7"))
    serve_versions(root, "classifier", (1, 2), release.manifest.model_copy(update={"strength": 0.25}))
    serve_versions(root, "student", (1, 2, 3))
    config = parse(path)
    assert config.instance_group[0].count == 7
    assert config.parameters["default_strength"].string_value == "0.25"
    assert list(parse(root / "classifier/configs/local.pbtxt").version_policy.specific.versions) == [1, 2]
    assert served_versions(root, "classifier") == (1, 2)
    assert served_versions(root, "student") == (1, 2, 3)
    assert list(parse(root / "student/configs/local.pbtxt").version_policy.specific.versions) == [1, 2, 3]


def test_classifier_without_its_student_is_refused(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    serve_versions(root, "classifier", (1, 2))
    with pytest.raises(RepositoryError, match=r"classifier serves versions \[1, 2\], student \[1\]"):
        releases.find_releases(root)


def test_manifest_from_before_limits_and_reduced_decoding_is_read_and_served_as_it_was(
    release: Release, tmp_path: Path
) -> None:
    """Such an export also keeps its version: an older manifest lacks the keys, but is the same release."""
    export = shutil.copytree(release.export_dir, tmp_path / "export")
    older = json.loads((export / MANIFEST_NAME).read_text())
    del older["limits"], older["image"]["room"]
    (export / MANIFEST_NAME).write_text(json.dumps(older))
    root = write_repository(export, tmp_path / "repository")
    for model in ("student", "classifier"):
        (root / model / "1" / MANIFEST_NAME).write_text(json.dumps(older))
    manifest = repositories.load_export(export)
    assert manifest.image.room == 0, "never decoded at a fraction"
    assert (manifest.limits.image_pixels, manifest.limits.request_pixels) == (16_000_000, 25_000_000)
    assert publish(export, root) == 1
