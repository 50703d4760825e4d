"""`tailor init`: suggests a params.yaml from the contents of a user's folder of images."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.made_imagenet import class_counts
from models.networks.encoders import ENCODERS
from pipeline.commands.app import main
from pipeline.data.assignment import assign
from pipeline.params import load_params
from pipeline.params.recipe import apply_recipe
from pipeline.preparation.encoder_choice import DEFAULT, EncoderChoice
from pipeline.preparation.first_params import suggest_params, text_values, without_text, write_text
from pipeline.preparation.folder_summary import inspect_folder
from pipeline.shared.artifacts import sha256_of
from pipeline.shared.errors import DataError, ParamsError
from pipeline.shared.fingerprint import ROOT
from pipeline.sources.source import Row
from tests.support.chosen_params import TEMPLATE, chosen_params, folder_summary
from tests.support.making import encode, picture, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 12, 6 and 2 pictures, 48x40 pixels."""
    for name, count in {"oak": 12, "elm": 6, "yew": 2}.items():
        (tmp_path / "trees" / name).mkdir(parents=True)
        for seed in range(count):
            (tmp_path / "trees" / name / f"{seed}.png").write_bytes(encode(picture(seed, (40, 48))))
    return tmp_path / "trees"


def test_a_light_background_is_the_colour_of_padding_and_cutout(folder: Path) -> None:
    assert inspect_folder(folder).background is None
    for file in folder.rglob("*.png"):
        pixels = np.full((40, 48, 3), (250, 240, 230), dtype=np.uint8)
        pixels[10:30, 10:30] = picture(int(file.stem), (20, 20))
        file.write_bytes(encode(pixels))
    summary = inspect_folder(folder)
    assert summary.background == [250, 240, 230]
    assert chosen_params(summary).student.augment.fill == chosen_params(summary).teacher.augment.fill == [250, 240, 230]
    assert chosen_params(folder_summary([30, 9])).student.augment.fill == [0, 0, 0]
    older = (ROOT / "tests/data/release-0.1.0/params.yaml").read_text(encoding="utf-8")  # without the key
    assert write_text(older, suggest_params(summary, "data/source", False))[1].student.augment.fill == [250, 240, 230]


@pytest.mark.slow
@given(counts=st.lists(st.integers(2, 5000), min_size=2, max_size=40), gpu=st.booleans(), side=st.integers(8, 4000))
def test_suggested_params_are_valid_and_leave_training_images_in_each_class(
    counts: list[int], gpu: bool, side: int
) -> None:
    params = chosen_params(folder_summary(counts, shorter=side), gpu)
    rows = [Row(f"{c}/{n}", c, f"{c}/{n}", "train") for c, count in enumerate(counts) for n in range(count)]
    splits = assign(rows, [str(c) for c in range(len(counts))], params.data)
    assert {row.label for row in splits["train"]} == {row.label for row in splits["test"]} == set(range(len(counts)))
    assert params.student.queue_total >= params.student.queue_minimum * len(counts)
    assert math.log2(params.student.queue_total).is_integer()
    assert params.student.batch_size <= max(8, len(splits["train"]) + len(splits["validation"]))


def test_suggested_params_for_the_papers_data_sets_are_close_to_the_papers() -> None:
    """CIFAR-100-LT: ResNet-32, K 4096, 200 epochs; ImageNet-LT: the ResNet-50 family at 224 pixels."""
    cifar = chosen_params(
        folder_summary([round(500 * 0.01 ** (c / 99)) for c in range(100)], tested=[100] * 100, own_validation=True)
    )
    assert (cifar.student.backbone, cifar.image.size, cifar.student.epochs) == ("resnet32", 32, 200)
    assert cifar.student.queue_total == 4096
    assert cifar.student.learning_rate == pytest.approx(0.05)
    counts = class_counts(1000, 1.0)["train"]
    imagenet = chosen_params(folder_summary(counts, tested=[50] * 1000, own_validation=True, shorter=375))
    assert (imagenet.student.backbone, imagenet.image.size, imagenet.image.resize_to) == (
        "torchvision/resnet50",
        224,
        256,
    )
    assert imagenet.student.queue_total == 32768  # twice the paper's 16384


def test_without_a_gpu_init_suggests_small_images_and_gives_the_reason() -> None:
    text, params = write_text(
        TEMPLATE, suggest_params(folder_summary([300, 30], shorter=400), "data/source", gpu=False)
    )
    assert params.image.size == 64
    assert "with a GPU run this command again" in text


@pytest.mark.parametrize("gpu", [True, False])
def test_the_recipe_of_an_encoder_applies_to_the_suggested_params(tmp_path: Path, gpu: bool) -> None:
    """With a GPU the suggested crop of photographs is `resized`, which is not possible with stored features."""
    text, _ = write_text(TEMPLATE, suggest_params(folder_summary([300, 30], shorter=400), "data/source", gpu))
    (tmp_path / "params.yaml").write_text(text)
    applied, _ = apply_recipe([ROOT / "recipes/photographs-lite0.yaml"], tmp_path / "params.yaml")
    assert yaml.safe_load(applied)["student"]["backbone"] == "encoder"


def test_inspect_folder_counts_images_and_measures_sizes(folder: Path) -> None:
    summary = inspect_folder(folder)
    assert (summary.classes, summary.counts, summary.shorter) == (["elm", "oak", "yew"], [6, 12, 2], 40)
    assert "imbalance factor 6.0" in str(summary)
    assert summary.tested is None


def test_an_unreadable_image_is_listed_and_the_others_are_used(folder: Path) -> None:
    (folder / "oak/0.png").write_bytes(b"no picture")
    summary = inspect_folder(folder)
    assert summary.unreadable == ["oak/0.png"]
    assert summary.shorter == 40


def test_existing_split_folders_are_used(folder: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        shutil.copytree(folder, tmp_path / "split" / part)
    summary = inspect_folder(tmp_path / "split")
    assert summary.tested == [6, 12, 2] and not summary.own_validation
    assert summary.counts == [6, 12, 2]
    assert not {"data.test_per_class", "data.test_share"} & set(suggest_params(summary, "x", gpu=False))


def test_a_class_with_one_image_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="class 'class 1' has 1 image"):
        suggest_params(folder_summary([9, 1]), "x", gpu=False)


def test_only_the_suggested_lines_of_the_template_change_each_with_its_reason() -> None:
    chosen = suggest_params(folder_summary([90, 9]), "photos: mine", gpu=True)
    text, _ = write_text(TEMPLATE, chosen)
    changed = [new for old, new in zip(TEMPLATE.splitlines(), text.splitlines(), strict=True) if old != new]
    assert 0 < len(changed) <= len(chosen)
    reasons = [why for _, why in chosen.values()]
    assert all(any(line.endswith(f"# {why}") for why in reasons) for line in changed)
    assert yaml.safe_load(text)["data"]["location"] == "photos: mine"


def test_a_template_without_a_key_is_refused_by_name() -> None:
    with pytest.raises(ParamsError, match=r"has no key image\.size"):
        write_text(
            TEMPLATE.replace("\nimage:\n  size:", "\nimage:\n  sized:"),
            suggest_params(folder_summary([90, 9]), "x", gpu=True),
        )


def test_uncommitted_changes_are_not_overwritten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = TEMPLATE.replace("seed: 0", "seed: 7", 1)
    Path("params.yaml").write_text(TEMPLATE, encoding="utf-8")
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.invalid")
    for command in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "delivered"]):
        subprocess.run([*git, *command], check=True)
    Path("params.yaml").write_text(mine, encoding="utf-8")
    assert main(["init", str(folder)]) == 2
    assert "has uncommitted changes" in capsys.readouterr().err
    assert Path("params.yaml").read_text(encoding="utf-8") == mine
    assert main(["init", str(folder), "--force", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["data.location"]["value"] == str(folder)
    assert yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["data"]["source"] == "folder"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "nowhere: no such folder"), ([".", "--output", "none.yaml"], "none.yaml: no such file")],
)
def test_a_wrong_argument_gives_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(TEMPLATE, encoding="utf-8")
    assert main(["init", *arguments, "--force"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_text_features_are_suggested_for_words_and_not_for_codes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(TEMPLATE, encoding="utf-8")
    write(tmp_path / "minilm/model.onnx", b"graph")
    write(tmp_path / "minilm/tokenizer.json", b"{}")
    command = ["init", str(folder), "--no-encoder", "--force", "--text", "minilm/model.onnx"]
    assert main(command) == 0 and "codes" not in capsys.readouterr().err
    chosen = load_params(Path("params.yaml"))
    student = chosen.student
    assert (student.contrast_encoder, student.beta, student.alpha) == ("text", 1.0, 0.0)
    assert chosen.text is not None and chosen.text.sha256 == sha256_of(tmp_path / "minilm/model.onnx")
    assert (chosen.text.encoder, chosen.text.tokenizer, chosen.text.names) == ("onnx", "minilm/tokenizer.json", None)

    (folder / "yew").rename(folder / "n01440764")
    Path("params.yaml").write_text(TEMPLATE, encoding="utf-8")
    assert main(command) == 0
    assert "init: warning: class names that are codes, not words: 1, such as 'n01440764'" in capsys.readouterr().err
    assert load_params(Path("params.yaml")).text is None

    write(tmp_path / "data/text/classes.csv", b"name,text\n")
    write(tmp_path / "data/text/oak.txt", b"An oak has acorns.")
    assert main(command) == 0 and "codes" not in capsys.readouterr().err
    chosen = load_params(Path("params.yaml"))
    assert chosen.text is not None and chosen.text.names is not None
    assert (chosen.text.names.file, chosen.text.descriptions) == ("data/text/classes.csv", "data/text")


def test_without_text_an_existing_section_is_removed_and_the_output_lists_what_was_removed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.safetensors", b"rows")
    Path("params.yaml").write_text(TEMPLATE, encoding="utf-8")
    command = ["init", str(folder), "--no-encoder", "--force"]
    assert main([*command, "--text", "rows.safetensors"]) == 0
    applied, _ = apply_recipe([ROOT / "recipes/variants/text-centres-raw.yaml"], tmp_path / "params.yaml")
    Path("params.yaml").write_text(applied, encoding="utf-8")
    assert load_params(Path("params.yaml")).student.uses_text
    capsys.readouterr()
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "text = None  # removed, as no text features are suggested" in output
    assert "student.contrast_encoder = teacher  # instead of text features" in output
    changed = load_params(Path("params.yaml"))
    assert (changed.text, changed.student.contrast_encoder, changed.student.contrast.kind) == (None, "teacher", "gml")
    assert main(command) == 0 and "text = None" not in capsys.readouterr().out  # it has no section text any more


def test_without_text_a_frozen_encoder_loses_the_adapter_that_text_features_needed(tmp_path: Path) -> None:
    (tmp_path / "rows.safetensors").write_bytes(b"rows")
    frozen = EncoderChoice(ENCODERS[DEFAULT], "a reason", 224, "its size")
    plain = suggest_params(folder_summary([90, 30], shorter=400), "photos", gpu=False, choice=frozen)
    with_text, params = write_text(TEMPLATE, plain | text_values(["oak"], tmp_path / "rows.safetensors", True)[0])
    assert params.student.uses_text and params.student.adapter > 0
    assert write_text(with_text, plain | without_text(with_text))[1] == write_text(TEMPLATE, plain)[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected sections such as data:"),
        ("- a\n", "expected sections such as data:"),
        ("student: 5\n", "has no key"),
    ],
)
def test_a_params_file_that_is_no_mapping_of_sections_is_one_line(
    content: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(content, encoding="utf-8")
    assert main(["init", str(folder), "--no-encoder", "--force"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "params.yaml: " in error and message in error


def test_a_frozen_encoder_gets_an_adapter_for_text_features(tmp_path: Path) -> None:
    (tmp_path / "rows.safetensors").write_bytes(b"rows")
    values, warning = text_values(["n01440764"], tmp_path / "rows.safetensors", adapter=True)
    assert values["text"][0]["encoder"] == "features" and values["student.adapter"][0] > 0 and not warning
    for name in ("none.onnx", "model.onnx"):
        (tmp_path / "model.onnx").touch()
        with pytest.raises(
            ParamsError, match=r"--text .*: (no such file|expected an \.onnx file with tokenizer\.json)"
        ):
            text_values(["oak"], tmp_path / name, adapter=False)
