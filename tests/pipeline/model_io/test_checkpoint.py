"""A trained network on disk: bit-identical after loading, old file kept on a full disk, one-line error for damage."""

import json
import resource
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from models.networks.cosine_classifier import ImageClassifier
from pipeline.model_io.checkpoint import (
    CONFIG,
    WEIGHTS,
    ModelConfig,
    build_model,
    check_image,
    load_model,
    save_model,
)
from pipeline.params import ImageParams
from pipeline.shared.artifacts import whole_folder
from pipeline.shared.errors import ParamsError, StageError

MODEL_CONFIG = ModelConfig("resnet20", 4, 0.1, 16, [0.4, 0.5, 0.6], [0.2, 0.2, 0.3])


def trained(seed=0):
    torch.manual_seed(seed)
    model = ImageClassifier("resnet20", 4, 0.1).train()
    with torch.no_grad():
        model(torch.randn(4, 3, 16, 16))  # changes the running statistics of the batch norms
    return model


@pytest.fixture
def saved(tmp_path):
    model = trained()
    save_model(model.state_dict(), MODEL_CONFIG, tmp_path / "student")
    return model, tmp_path / "student"


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def test_a_loaded_network_is_bit_identical_and_in_eval_mode(saved):
    model, folder = saved
    random = torch.get_rng_state()
    loaded, config = load_model(folder, "student")
    assert torch.equal(torch.get_rng_state(), random), "loading draws nothing from the global generator"
    assert config == MODEL_CONFIG and loaded.tau_s == 0.1 and not loaded.training and same(model, loaded)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images)[1], model.eval()(images)[1])


@pytest.mark.parametrize(
    "classifier", [{"kind": "linear"}, {"kind": "causal", "heads": 4, "alpha": 3.0, "momentum": 0.9}]
)
def test_a_network_with_another_classifier_is_bit_identical_after_loading(classifier, tmp_path):
    config = replace(MODEL_CONFIG, tau_s=1.0, classifier=classifier)
    model = build_model(config, "student.backbone").train()
    model(torch.randn(4, 3, 16, 16))
    save_model(model.state_dict(), config, tmp_path)
    loaded, read = load_model(tmp_path, "student")
    images = torch.randn(2, 3, 16, 16)
    assert read == config and same(model, loaded) and torch.equal(loaded(images)[1], model.eval()(images)[1])


def test_heads_that_do_not_divide_the_feature_are_refused_with_their_key():
    with pytest.raises(
        ParamsError, match=r"student.classifier.heads is 3, which does not divide the feature's 64 values"
    ):
        build_model(replace(MODEL_CONFIG, classifier={"kind": "causal", "heads": 3}), "student.backbone")


def test_a_network_in_channels_last_memory_is_saved_as_well(tmp_path):
    model = trained().to(memory_format=torch.channels_last)
    save_model(model.state_dict(), MODEL_CONFIG, tmp_path)
    assert same(model, load_model(tmp_path, "student")[0])


def test_the_weights_are_plain_safetensors_and_the_config_readable(saved):
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert set(safetensors.torch.load_file(folder / WEIGHTS)) == set(model.state_dict())
    assert json.loads((folder / CONFIG).read_text())["backbone"] == "resnet20"


def test_a_full_disk_keeps_the_old_checkpoint_and_names_the_file(saved):
    old, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / f".{WEIGHTS}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_model(trained(seed=1).state_dict(), MODEL_CONFIG, folder)
    assert caught.value.filename == str(folder / WEIGHTS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert same(old, load_model(folder, "student")[0])


def test_a_full_disk_during_the_weights_leaves_the_old_folder(saved):
    old, folder = saved
    # The operating system's limit on file sizes (RLIMIT_FSIZE); Python ignores the signal, and the write fails.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, whole_folder(folder) as partial:
            save_model(trained(seed=1).state_dict(), MODEL_CONFIG, partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename.endswith(WEIGHTS)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert same(old, load_model(folder, "student")[0])


def damage(folder, kind):
    weights, config = folder / WEIGHTS, folder / CONFIG
    data = weights.read_bytes()
    if kind == "empty":
        weights.write_bytes(b"")
    elif kind == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif kind == "header":
        weights.write_bytes(b"\xff" * 8 + data[8:])
    elif kind == "another network":
        safetensors.torch.save_file({"weight": torch.zeros(2)}, weights)
    elif kind == "another shape":
        save_model(ImageClassifier("resnet20", 5, 0.1).state_dict(), MODEL_CONFIG, folder)
    elif kind == "config cut":
        config.write_text(config.read_text()[:20])
    elif kind == "config not text":
        config.write_bytes(b"\xff\xfe{}")
    elif kind == "config of another version":
        config.write_text('{"backbone": "resnet20", "layers": 3}')


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "truncated",
        "header",
        "another network",
        "another shape",
        "config cut",
        "config not text",
        "config of another version",
    ],
)
def test_a_damaged_checkpoint_is_one_line_that_names_it(saved, kind):
    _, folder = saved
    damage(folder, kind)
    with pytest.raises(StageError) as caught:
        load_model(folder, "student")
    message = str(caught.value)
    assert message.startswith(f"{folder}: damaged or of another version: ") and message.endswith(
        "; run `dvc repro -f student`"
    )
    assert "\n" not in message and caught.value.exit_code == 1


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_checkpoint_that_was_never_made_names_the_file_and_the_stage(saved, name):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(ParamsError, match=rf"{name}: no such file; run `dvc repro teacher` first"):
        load_model(folder, "teacher")


def test_a_network_of_images_of_another_size_normalisation_or_interpolation_is_refused(tmp_path):
    image = ImageParams(size=16, resize_to=16, mean=MODEL_CONFIG.mean, std=MODEL_CONFIG.std)
    check_image(MODEL_CONFIG, image, tmp_path)
    for key, value in {"size": 15, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}.items():
        with pytest.raises(
            ParamsError, match=rf"^image\.{key} is .*, but {tmp_path} was trained with .*; run `dvc repro`"
        ):
            check_image(MODEL_CONFIG, image.model_copy(update={key: value}), tmp_path)


def test_an_unknown_backbone_names_its_key():
    config = ModelConfig("resnet21", 4, 0.1, 16, [0.5] * 3, [0.5] * 3)
    with pytest.raises(ParamsError, match=r"^student.backbone: backbone 'resnet21' is unknown.*did you mean resnet"):
        build_model(config, "student.backbone")


def test_a_checkpoint_inside_a_whole_folder_that_fails_is_not_seen(tmp_path):
    def fail():
        with whole_folder(tmp_path / "student") as folder:
            save_model(trained().state_dict(), MODEL_CONFIG, folder)
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
