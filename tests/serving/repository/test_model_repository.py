"""`write_repository`: written files, and rejected exports."""

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
from serving.commands import main
from serving.repository import model_config
from serving.repository import release as releases
from serving.repository import writer as repositories
from serving.repository.manifest import MANIFEST_NAME, Golden, HalfPrecision, ManifestError, sha256_of
from serving.repository.model_config import EXTRA_DIMS, EXTRA_INPUTS, EXTRA_OUTPUTS, Placement
from serving.repository.writer import write_repository
from serving.shared.errors import InputError, RepositoryError


def parse(path: Path) -> ModelConfig:
    return text_format.Parse(path.read_text(), ModelConfig())


def snapshot(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): sha256_of(path) for path in root.rglob("*") if path.is_file()}


def test_tree_holds_the_release_and_nothing_else(repository: Path) -> None:
    assert sorted(snapshot(repository)) == [
        "classifier/1/__pycache__",
        "classifier/1/access_log.py",
        "classifier/1/decisions.py",
        "classifier/1/explain.py",
        "classifier/1/extras.py",
        "classifier/1/folder_files.py",
        "classifier/1/golden.json",
        "classifier/1/live_prior.py",
        "classifier/1/logit_log.py",
        "classifier/1/manifest.json",
        "classifier/1/metrics.py",
        "classifier/1/model.py",
        "classifier/1/network.py",
        "classifier/1/preprocess.py",
        "classifier/1/prior.py",
        "classifier/1/request_parser.py",
        "classifier/1/start.py",
        "classifier/1/taxonomy.py",
        "classifier/1/unknown_images.py",
        "classifier/config.pbtxt",
        "classifier/configs/local.pbtxt",
        "student/1/__pycache__",
        "student/1/manifest.json",
        "student/1/model.onnx",
        "student/1/model.py",
        "student/1/network.py",
        "student/1/start.py",
        "student/config.pbtxt",
        "student/configs/local.pbtxt",
        "student/labels.txt",
    ]


def test_shared_arithmetic_is_copied_byte_for_byte(repository: Path) -> None:
    for module in (models.prior, models.preprocess):
        source = Path(module.__file__)
        assert (repository / "classifier" / "1" / source.name).read_bytes() == source.read_bytes()


def test_configs_have_the_complete_signature(repository: Path) -> None:
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
        ("prior", [1], True),
        *((name, [1], True) for name in EXTRA_INPUTS),
    ]
    assert [(tensor.name, list(tensor.dims)) for tensor in classifier.output] == [
        ("class", [TOP_K]),
        ("index", [TOP_K]),
        ("probability", [TOP_K]),
        *((name, EXTRA_DIMS.get(name, [1])) for name in EXTRA_OUTPUTS),
    ]
    assert [group.count for group in student.instance_group] == [1]
    assert [group.count for group in classifier.instance_group] == [2]


def test_configs_batch_without_delay_or_queue_policy_and_list_what_they_serve(repository: Path) -> None:
    for name in ("student/config.pbtxt", "student/configs/local.pbtxt", "classifier/config.pbtxt"):
        config = parse(repository / name)
        assert config.max_batch_size == MAX_BATCH_SIZE
        assert config.HasField("dynamic_batching")
        assert not config.dynamic_batching.ListFields()
        assert list(config.version_policy.specific.versions) == [1]


def test_local_config_differs_only_in_the_backend_that_runs_the_graph(repository: Path) -> None:
    real, local = parse(repository / "student/config.pbtxt"), parse(repository / "student/configs/local.pbtxt")
    assert local.backend == "python"
    for config in (real, local):
        for field in ("backend", "default_model_filename", "instance_group"):
            config.ClearField(field)
        config.parameters.pop("execution_provider", None)
    assert real == local


def test_small_network_has_two_instances_and_a_place_in_the_classifier_of_the_local_server(
    release: Release, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decided(root: Path) -> list[tuple[int, str]]:
        configs = [parse(root / model / "configs/local.pbtxt") for model in ("student", "classifier")]
        return [(config.instance_group[0].count, config.parameters["network"].string_value) for config in configs]

    assert decided(repository) == [(2, ""), (2, "own")]
    for name in ("config.pbtxt", "configs/local.pbtxt"):
        assert parse(repository / "classifier" / name).input == parse(repository / "classifier/config.pbtxt").input
    assert "network" not in parse(repository / "classifier/config.pbtxt").parameters
    asking = write_repository(release.export_dir, tmp_path / "asking", Placement(instances=3, own_network=False))
    assert decided(asking) == [(3, ""), (2, "")]
    own = write_repository(release.export_dir, tmp_path / "own", Placement(instances=3))
    assert decided(own) == [(3, ""), (3, "own")]
    monkeypatch.setattr(model_config, "SMALL_GRAPH_BYTES", 10)
    assert decided(write_repository(release.export_dir, tmp_path / "large")) == [(1, ""), (2, "")]


def test_a_float16_graph_counts_for_twice_its_file_because_a_cpu_holds_it_in_float32(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = shutil.copytree(release.export_dir, tmp_path / "export")
    half = HalfPrecision(logit=0.01, agreement=1.0, images=100)
    (export / "manifest.json").write_text(release.manifest.model_copy(update={"half": half}).model_dump_json())
    size = (export / "student.onnx").stat().st_size
    for bound, instances in ((2 * size, 2), (2 * size - 1, 1)):
        monkeypatch.setattr(model_config, "SMALL_GRAPH_BYTES", bound)
        root = write_repository(export, tmp_path / "repository")
        assert parse(root / "student/configs/local.pbtxt").instance_group[0].count == instances


def test_a_golden_answer_may_bring_a_wider_tolerance_of_its_own() -> None:
    usual = Golden(image="", strength=0, index=[1, 0], probability=[0.7, 0.3])
    wider = usual.model_copy(update={"tolerance": 0.02})
    assert usual.difference([1, 0], [0.69, 0.31]) == "probability 0.6900 at rank 1, 0.7000 expected"
    assert wider.difference([1, 0], [0.69, 0.31]) is None
    assert wider.difference([1, 0], [0.67, 0.33]) == "probability 0.6700 at rank 1, 0.7000 expected"


def test_gpu_repository_puts_the_student_on_the_gpu(release: Release, tmp_path: Path) -> None:
    root = write_repository(release.export_dir, tmp_path / "repository", device="gpu")
    assert parse(root / "student/config.pbtxt").instance_group[0].kind == ModelInstanceGroup.Kind.KIND_GPU
    provider = parse(root / "student/configs/local.pbtxt").parameters["execution_provider"].string_value
    assert provider == "CUDAExecutionProvider"
    assert "network" not in parse(root / "classifier/configs/local.pbtxt").parameters


def test_the_command_prints_the_written_path_for_scripts(
    release: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "repository")
    assert main(["repository", "--export", str(release.export_dir), "--output", output, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written == {"repository": output, "versions": [1], "device": "cpu", "instances": 2}


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


def test_tree_lost_between_the_renames_is_restored(release: Release, tmp_path: Path) -> None:
    root = write_repository(release.export_dir, tmp_path / "repository")
    root.rename(tmp_path / ".repository.old")  # the state after a kill between the two renames
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
        (lose_classifier_version, r"classifier/1/model\.py: is missing"),
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


def test_tensorrt_builds_before_the_model_is_ready_and_once_for_all_batches(release: Release, tmp_path: Path) -> None:
    placement = Placement("gpu", gpus=(0, 2), instances=3, tensorrt="fp16")
    root = write_repository(release.export_dir, tmp_path / "repository", placement)
    config = parse(root / "student/config.pbtxt")
    assert [(group.count, list(group.gpus)) for group in config.instance_group] == [(3, [0, 2])]
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator[0]
    assert (accelerator.name, accelerator.parameters["precision_mode"]) == ("tensorrt", "FP16")
    assert accelerator.parameters["trt_profile_max_shapes"] == f"image:8x3x{SIZE}x{SIZE},strength:8x1"
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, MAX_BATCH_SIZE]
    local = parse(root / "student/configs/local.pbtxt")
    assert not local.HasField("optimization")
    assert local.instance_group[0].count == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; expected cpu or gpu"),
        ({"tensorrt": "fp16"}, "device is cpu; expected gpu"),
        ({"gpus": (0,)}, "device is cpu; expected gpu"),
        ({"device": "gpu", "gpus": (1, 1)}, "gpus are \\[1, 1\\]; expected different numbers"),
        ({"device": "gpu", "gpus": (-1,)}, "expected different numbers from 0"),
        ({"device": "gpu", "own_network": True}, "own_network is for device cpu"),
        ({"instances": 0}, "instances is 0; expected at least 1"),
        ({"device": "gpu", "tensorrt": "int8"}, "tensorrt is 'int8'; expected fp32 or fp16"),
    ],
)
def test_placement_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Placement(**options)
