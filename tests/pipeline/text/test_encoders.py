"""Encoders of open_clip and transformers with stand-ins for both packages.

The stand-ins have only the functions that Tailor calls: one token for each letter, and its vector as the feature.
test_tiny_clip.py uses the true packages; transformers only where it is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.params import TextParams
from pipeline.shared.errors import ParamsError
from pipeline.text.encoders import open_encoder

LIMIT = 10


class Letters(torch.nn.Module):
    """Mean of the vectors of the letters; letter 0 is padding."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(128, width)
        self.config = SimpleNamespace(model_type="clip", text_config=SimpleNamespace(max_position_embeddings=LIMIT))

    def encode_text(self, ids: Tensor) -> Tensor:
        used = (ids > 0).float()[..., None]
        return (self.table(ids) * used).sum(1) / used.sum(1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert attention_mask.dtype == torch.int64
        return SimpleNamespace(pooler_output=self.encode_text(input_ids))


class Tokenizer:
    """One token for each letter, padded or cut to LIMIT, as open_clip's or transformers' tokenizer returns it."""

    context_length = model_max_length = LIMIT

    def encode(self, sentence: str) -> list[int]:
        return [ord(letter) % 128 for letter in sentence][:1000]

    def __call__(self, sentences: list[str], context_length: int = LIMIT, **options: Any) -> Any:
        if options.get("truncation") is False:
            return {"input_ids": [self.encode(sentence) for sentence in sentences]}
        limit = options.get("max_length", context_length)
        if options.get("padding") is True:
            limit = min(limit, max(map(len, sentences)))
        ids = torch.zeros(len(sentences), limit, dtype=torch.int64)
        for row, sentence in enumerate(sentences):
            tokens = self.encode(sentence)[:limit]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()} if options else ids


@pytest.fixture(name="network", autouse=True)
def _network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Letters:
    """A network whose weights are in tmp_path/model.safetensors, and both packages with other, random weights."""
    network = Letters()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    configs = {"RN50": {"text_cfg": {}}, "coca": {"text_cfg": {"hf_model_name": "roberta"}}}
    clip = SimpleNamespace(
        list_models=lambda: list(configs),
        get_model_config=configs.get,
        create_model=lambda *_, **__: Letters(),
        get_tokenizer=lambda _: Tokenizer(),
    )
    monkeypatch.setitem(sys.modules, "open_clip", clip)  # type: ignore[arg-type]
    loaded = network, {"missing_keys": set[str]()}
    hugging = SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda *_, **__: Tokenizer()),
        AutoModel=SimpleNamespace(from_pretrained=lambda *_, **__: loaded),
    )
    monkeypatch.setitem(sys.modules, "transformers", hugging)  # type: ignore[arg-type]
    return network


def section(root: Path, encoder: str, **changes: Any) -> TextParams:
    """Section `text` of an encoder."""
    kind = {"file": str(root / "model.safetensors"), "model": "RN50"} if encoder == "open_clip" else {"file": str(root)}
    return TextParams(**{"encoder": encoder, **kind, **changes})


@pytest.mark.parametrize("encoder", ["open_clip", "transformers"])
def test_features_are_those_of_the_weights_and_long_sentences_are_cut_and_counted(
    encoder: str, tmp_path: Path, network: Letters
) -> None:
    opened = open_encoder(section(tmp_path, encoder, max_tokens=8))
    features, cut = opened.encode(["cat", "a long sentence", "dog"], batch_size=2)
    vectors = network.table.weight.detach().numpy()
    for row, letters in enumerate(("cat", "a long s", "dog")):
        expected = vectors[[ord(letter) for letter in letters]].mean(0)
        np.testing.assert_allclose(features[row], expected, atol=1e-6)
    assert (cut, opened.limit) == (1, 8)


def test_weights_and_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    save_file(Letters(width=5).state_dict(), tmp_path / "other.safetensors")
    for changes, message in (
        ({"model": "RN7"}, "text.model is 'RN7', which open_clip does not have"),
        ({"model": "coca"}, "whose hf_model_name open_clip would download"),
        ({"file": str(tmp_path / "other.safetensors")}, "does not hold the weights of RN50"),
        ({"sha256": "0" * 64}, "text.sha256 is 000"),
    ):
        with pytest.raises(ParamsError, match=message):
            open_encoder(section(tmp_path, "open_clip", **changes))
    with pytest.raises(ParamsError, match=r"text\.file is 'nowhere/model\.safetensors'"):
        open_encoder(section(tmp_path, "transformers", file="nowhere"))


def test_a_folder_without_all_weights_of_its_model_is_refused(
    tmp_path: Path, network: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = network, {"missing_keys": {"text_model.pooler.weight", "text_model.layer.0.weight"}}
    model = SimpleNamespace(from_pretrained=lambda *_, **__: missing)
    monkeypatch.setattr(sys.modules["transformers"], "AutoModel", model)
    with pytest.raises(ParamsError, match=r"has no text_model\.layer\.0\.weight; is it of this model\?"):
        open_encoder(section(tmp_path, "transformers"))


def test_a_siglip_feature_of_the_last_position_does_not_depend_on_the_batch(tmp_path: Path, network: Letters) -> None:
    network.config.model_type = "siglip2"
    network.encode_text = lambda ids: network.table(ids)[:, -1]  # type: ignore[method-assign]
    opened, sentences = open_encoder(section(tmp_path, "transformers")), ["a", "cat", "sea horse"]
    one_by_one, _ = opened.encode(sentences, batch_size=1)
    np.testing.assert_array_equal(opened.encode(sentences, batch_size=3)[0], one_by_one)


def test_damaged_weights_of_a_transformers_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(folder: Path, **_: Any) -> Any:
        return load_file(folder / "model.safetensors"), {"missing_keys": set[str]()}

    monkeypatch.setattr(sys.modules["transformers"], "AutoModel", SimpleNamespace(from_pretrained=load))
    (tmp_path / "model.safetensors").write_bytes(b"damaged weights")
    with pytest.raises(ParamsError, match="which transformers cannot load: Error while deserializing header"):
        open_encoder(section(tmp_path, "transformers"))


def test_a_transformers_model_of_a_hub_is_downloaded_without_code_and_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[Any] = []
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, file, **__: str(tmp_path / file))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *owner, **options: requested.append((owner, options))
    )
    source = "hf://owner/name@v1"
    features, _ = open_encoder(section(tmp_path, "transformers", file=source, download=True)).encode(["cat"], 1)
    local, _ = open_encoder(section(tmp_path, "transformers")).encode(["cat"], 1)
    np.testing.assert_array_equal(features, local)
    patterns = ["*.json", "*.txt", "model.safetensors"]
    assert requested == [(("owner/name",), {"revision": "v1", "allow_patterns": patterns})]
    open_encoder(section(tmp_path, "transformers", file=source))  # from the cache, without a download
    assert len(requested) == 1

    def unreachable(*_: str, **__: Any) -> None:
        raise OSError("no route to the host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        ParamsError, match=r"^text\.file: hf://owner/name@v1: no route to the host; check the address and"
    ):
        open_encoder(section(tmp_path, "transformers", file=source, download=True))
