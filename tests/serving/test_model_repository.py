"""What `write_repository` leaves on the disk, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import CLASSES, FEATURE_DIM, MAX_BATCH_SIZE, SIZE, TOP_K, Release, write_export
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

import models.preprocess
import models.prior
from serving import release as releases
from serving import repository as repositories
from serving.manifest import MANIFEST_NAME, ManifestError, sha256_of
from serving.repository import RepositoryError, write_repository


def parse(path: Path) -> ModelConfig:
    return text_format.Parse(path.read_text(), ModelConfig())


def snapshot(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): sha256_of(path)
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_tree_holds_the_release_and_nothing_else(repository: Path) -> None:
    assert sorted(snapshot(repository)) == [
        "classifier/1/access_log.py",
        "classifier/1/golden.json",
        "classifier/1/manifest.json",
        "classifier/1/metrics.py",
        "classifier/1/model.py",
        "classifier/1/preprocess.py",
        "classifier/1/prior.py",
        "classifier/config.pbtxt",
        "student/1/manifest.json",
        "student/1/model.onnx",
        "student/1/model.py",
        "student/config.pbtxt",
        "student/configs/local.pbtxt",
        "student/labels.txt",
    ]


def test_shared_arithmetic_is_copied_byte_for_byte(repository: Path) -> None:
    for module in (models.prior, models.preprocess):
        source = Path(module.__file__)
        assert (repository / "classifier" / "1" / source.name).read_bytes() == source.read_bytes()


def test_configs_say_the_whole_signature(repository: Path) -> None:
    student = parse(repository / "student" / "config.pbtxt")
    classifier = parse(repository / "classifier" / "config.pbtxt")
    assert student.backend == "onnxruntime"
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in student.input] == [
        ("image", DataType.TYPE_UINT8, [3, SIZE, SIZE]),
        ("strength", DataType.TYPE_FP32, [1]),
    ]
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in student.output] == [
        ("logits", DataType.TYPE_FP32, [len(CLASSES)]),
        ("feature", DataType.TYPE_FP32, [FEATURE_DIM]),
    ]
    assert not any(tensor.optional for tensor in student.input)
    assert [(tensor.name, list(tensor.dims), tensor.optional) for tensor in classifier.input] == [
        ("image", [1], False),
        ("strength", [1], True),
        ("target_prior", [len(CLASSES)], True),
    ]
    assert [(tensor.name, list(tensor.dims)) for tensor in classifier.output] == [
        ("class", [TOP_K]),
        ("index", [TOP_K]),
        ("probability", [TOP_K]),
    ]
    assert [group.count for group in student.instance_group] == [1]
    assert [group.count for group in classifier.instance_group] == [2]


def test_configs_batch_without_delay_or_queue_policy_and_keep_two_versions(repository: Path) -> None:
    for name in ("student/config.pbtxt", "student/configs/local.pbtxt", "classifier/config.pbtxt"):
        config = parse(repository / name)
        assert config.max_batch_size == MAX_BATCH_SIZE
        assert config.HasField("dynamic_batching")
        assert not config.dynamic_batching.ListFields()
        assert config.version_policy.latest.num_versions == 2


def test_stand_in_config_differs_only_in_who_runs_the_graph(repository: Path) -> None:
    real, local = parse(repository / "student/config.pbtxt"), parse(repository / "student/configs/local.pbtxt")
    assert local.backend == "python"
    for config in (real, local):
        for field in ("backend", "default_model_filename", "instance_group"):
            config.ClearField(field)
        config.parameters.pop("execution_provider", None)
    assert real == local


def test_gpu_repository_puts_the_student_on_the_gpu(release: Release, tmp_path: Path) -> None:
    root = write_repository(release.export_dir, tmp_path / "repository", device="gpu")
    assert parse(root / "student/config.pbtxt").instance_group[0].kind == ModelInstanceGroup.Kind.KIND_GPU
    provider = parse(root / "student/configs/local.pbtxt").parameters["execution_provider"].string_value
    assert provider == "CUDAExecutionProvider"


def test_writing_twice_gives_the_same_bytes_in_the_same_place(release: Release, tmp_path: Path) -> None:
    first = snapshot(write_repository(release.export_dir, tmp_path / "repository"))
    assert snapshot(write_repository(release.export_dir, tmp_path / "repository")) == first
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


@pytest.mark.parametrize("moment", ["copying", "renaming"])
def test_interrupted_writing_leaves_the_old_tree(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    root = write_repository(release.export_dir, tmp_path / "repository")
    before = snapshot(root)
    newer = tmp_path / "newer"
    write_export(newer, version=2)

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    if moment == "copying":
        monkeypatch.setattr(repositories.shutil, "copyfile", interrupted)
    else:
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda path, to: interrupted() if path.name.endswith(".partial") else rename(path, to)
        )
    with pytest.raises(KeyboardInterrupt):
        write_repository(newer, root)
    assert snapshot(root) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newer", "repository"]


def test_tree_lost_between_the_renames_comes_back(release: Release, tmp_path: Path) -> None:
    root = write_repository(release.export_dir, tmp_path / "repository")
    root.rename(tmp_path / ".repository.old")  # what a kill between the two renames leaves
    (tmp_path / "export").mkdir()
    with pytest.raises(ManifestError, match=r"export/manifest\.json: No such file"):
        write_repository(tmp_path / "export", root)
    write_repository(release.export_dir, root)
    assert (root / "student" / "config.pbtxt").is_file()
    assert not (tmp_path / ".repository.old").exists()


def test_folder_with_other_files_is_not_replaced(release: Release, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    with pytest.raises(RepositoryError, match=r"photos: holds files but no student/config\.pbtxt"):
        write_repository(release.export_dir, tmp_path / "photos")
    assert (tmp_path / "photos" / "holiday.jpg").exists()


def test_export_that_differs_from_its_manifest_is_refused(release: Release, tmp_path: Path) -> None:
    export = shutil.copytree(release.export_dir, tmp_path / "export")
    (export / "student.onnx").write_bytes(b"another graph")
    with pytest.raises(ManifestError, match=r"student\.onnx: sha256 is"):
        write_repository(export, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("name", ["two\nlines", " ", "ant"])
def test_class_name_that_a_label_file_cannot_hold_is_refused(release: Release, tmp_path: Path, name: str) -> None:
    export = shutil.copytree(release.export_dir, tmp_path / "export")
    manifest = json.loads((export / MANIFEST_NAME).read_text())
    manifest["classes"][1] = name
    (export / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(RepositoryError, match="rename"):
        write_repository(export, tmp_path / "repository")


def break_onnx(root: Path) -> None:
    path = root / "student" / "1" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def lose_stand_in(root: Path) -> None:
    (root / "student" / "1" / "model.py").unlink()


def lose_classifier_version(root: Path) -> None:
    shutil.rmtree(root / "classifier" / "1")


def break_config(root: Path) -> None:
    (root / "classifier" / "config.pbtxt").write_text("max_batch_size: many")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_onnx, r"model\.onnx: sha256 is"),
        (lose_stand_in, r"student/1/model\.py: is missing"),
        (lose_classifier_version, r"student has versions \[1\], classifier \[\]"),
        (break_config, r"classifier/config\.pbtxt: not a model configuration"),
    ],
)
def test_damaged_repository_is_refused_before_a_server_starts(
    repository: Path, tmp_path: Path, damage, message: str
) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    damage(root)
    with pytest.raises((RepositoryError, ManifestError), match=message):
        releases.find_releases(root)


def test_dry_run_refuses_a_graph_that_onnx_runtime_cannot_read(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    found = releases.find_releases(root)[0]
    (root / "student" / "1" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(RepositoryError, match=r"model\.onnx: ONNX Runtime cannot run it"):
        releases.dry_run(root, found)


def test_dry_run_refuses_a_graph_with_other_answers_than_the_golden_ones(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    found = releases.find_releases(root)[0]
    write_export(tmp_path / "export", version=2)
    shutil.copyfile(tmp_path / "export" / "student.onnx", root / "student" / "1" / "model.onnx")
    with pytest.raises(RepositoryError, match=r"a golden request is answered wrongly"):
        releases.dry_run(root, found)
