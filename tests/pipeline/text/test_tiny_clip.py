"""Text towers of CLIP in the true packages, with tiny random models that the tests build; no network, no downloaded file.

open_clip is in the lock. transformers is not: two tests alone would need this large package, so they are skipped without it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from models.preprocess import preprocess
from pipeline import embed, embed_text, prior, split, student
from pipeline.features.stored import load_features
from pipeline.params import TextParams
from pipeline.shared.artifacts import TEXT, sha256_of
from pipeline.shared.errors import ParamsError
from pipeline.text.encoders import open_encoder
from pipeline.text.stored import load_text_features
from tests.support.making import folder
from tests.support.small_encoder import tiny_params

WORDS = ("<|startoftext|>", "<|endoftext|>", "<unk>", "a", "photo", "of", "cat", "dog", ".", "собака")
LIMIT = 8
SIZES = {"cat": 30, "sea_horse": 12, "собака": 8}
IMAGE_MODEL, SIDE = "test_vit", 160  # of timm, 0.3 million parameters; its last layer has 1,000 outputs


def write_transformers(root: Path) -> Any:
    """Write a CLIP of transformers with its tokenizer, one token for each word; returns the model."""
    transformers = pytest.importorskip("transformers", reason="too large for the lock; pip install transformers")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(WORDS[0], 0), (WORDS[1], 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{WORDS[0]} $A {WORDS[1]}", special_tokens=ends)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=WORDS[0], eos_token=WORDS[1], pad_token=WORDS[1], unk_token="<unk>",
        model_max_length=LIMIT,
    ).save_pretrained(root)  # fmt: skip
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**tower, **ids, "vocab_size": len(WORDS), "max_position_embeddings": LIMIT},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.CLIPModel(config).eval()
    model.save_pretrained(root)
    return model


def test_features_of_a_transformers_clip_are_in_the_space_of_its_images(tmp_path: Path) -> None:
    model = write_transformers(tmp_path)
    encoder = open_encoder(TextParams(encoder="transformers", file=str(tmp_path)))
    features, cut = encoder.encode(["A photo of a cat.", "dog", "собака"], batch_size=2)
    tokens = [[0, 3, 4, 5, 3, 6, 8, 1], [0, 7, 1], [0, 9, 1]]
    tokens[0] = [*tokens[0][: LIMIT - 1], 1]
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        vision = model.vision_model(pixel_values=pixels).pooler_output
        images = F.normalize(model.visual_projection(vision), dim=1)
        cosines = [
            model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits_per_text[0] / model.logit_scale.exp()
            for ids in tokens
        ]
    unit = F.normalize(torch.from_numpy(features), dim=1)
    torch.testing.assert_close(unit @ images.T, torch.stack(cosines), atol=1e-5, rtol=0)
    assert encoder.limit == LIMIT and encoder.record["sha256"] == sha256_of(tmp_path / "model.safetensors")
    assert cut == 0 and encoder.encode(["a a a a a a a cat"], 1)[1] == 1


def test_a_transformers_clip_with_weights_of_another_model_is_refused(tmp_path: Path) -> None:
    model = write_transformers(tmp_path)
    safetensors.torch.save_file(model.vision_model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ParamsError, match=r"its model\.safetensors has no .*; is it of this model\?"):
        open_encoder(TextParams(encoder="transformers", file=str(tmp_path)))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ParamsError, match=r"^text\.file is .*, which transformers cannot load: "):
        open_encoder(TextParams(encoder="transformers", file=str(tmp_path)))


def write_open_clip(root: Path) -> tuple[Any, Any]:
    """Write weights of a CLIP of open_clip: its text tower, and as image tower a network of timm. Returns model, tokenizer."""
    import open_clip

    config = {
        "embed_dim": 1000,
        "vision_cfg": {"timm_model_name": IMAGE_MODEL, "timm_pool": "token", "timm_proj": "", "image_size": SIDE},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (root / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(root / "tiny-clip.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = open_clip.create_model("tiny-clip", pretrained=None).eval()
    safetensors.torch.save_file(model.state_dict(), root / "clip.safetensors")
    images = {
        name.removeprefix("visual.trunk."): weight for name, weight in model.visual.state_dict(prefix="visual.").items()
    }
    safetensors.torch.save_file(images, root / "images.safetensors")
    return model, open_clip.get_tokenizer("tiny-clip")


def test_an_open_clip_model_trains_with_raw_centres_and_its_zero_shot_accuracy_is_that_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = write_open_clip(tmp_path)
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "images.safetensors"
    made = tiny_params(weights, folder(tmp_path / "images", SIZES), {
        "encoder": {"name": f"timm/{IMAGE_MODEL}+projection", "weights": str(weights), "sha256": sha256_of(weights)},
        "image": {"size": SIDE, "resize_to": SIDE, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
        "data.validation_per_class": 4,
        "text": {"encoder": "open_clip", "model": "tiny-clip", "file": "clip.safetensors", "templates": ["a {}.", "two {}"]},
        "student.contrast_encoder": "text", "student.alpha": 0.0, "student.projection_dim": 8, "student.epochs": 1,
        "student.contrast": {"kind": "gml", "centres": "raw", "sentences": "all"},
    })  # fmt: skip
    for stage in (split, prior, embed, embed_text):
        stage.run(made)
    names = sorted(SIZES)
    text = load_text_features(TEXT, names)
    sentences = [template.format(name.replace("_", " ")) for name in names for template in ("a {}.", "two {}")]
    assert list(text.sentences) == sentences
    with torch.inference_mode():
        expected = model.encode_text(tokenizer(sentences), normalize=True)
    np.testing.assert_allclose(text.features, expected, atol=1e-6)

    validation = load_features(made, "validation")
    pixels = np.stack(
        [preprocess(validation.encoded(row), SIDE, SIDE, interpolation="bicubic") for row in range(len(validation))]
    )
    with torch.inference_mode():
        images = model.visual((torch.from_numpy(pixels) / 255 - 0.5) / 0.5)
    torch.testing.assert_close(validation.images[:, 0].float(), images, atol=1e-3, rtol=1e-3)  # stored as float16
    scores = F.normalize(images, dim=1) @ F.normalize(expected.view(3, 2, -1).mean(1), dim=1).T
    accuracy = (scores.argmax(1) == validation.labels).float().mean().item()
    capsys.readouterr()
    student.run(made)
    assert (
        len(validation) > 8
        and f"zero-shot, without training: {accuracy:.1%} of the validation images" in capsys.readouterr().out
    )


@pytest.mark.parametrize("model", ["hf-hub:owner/name", "local-dir:/nowhere", "RN7", ""])
def test_a_model_that_open_clip_would_look_up_elsewhere_is_refused_without_network(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", lambda *_, **__: pytest.fail("a download"))
    with pytest.raises(
        ParamsError, match=f"^text.model is '{model}', which open_clip does not have; expected one such"
    ):
        open_encoder(TextParams(encoder="open_clip", model=model, file=str(tmp_path)))


def test_weights_of_another_open_clip_model_are_refused(tmp_path: Path) -> None:
    write_open_clip(tmp_path)
    section = TextParams(encoder="open_clip", model="tiny-clip", file=str(tmp_path / "images.safetensors"))
    with pytest.raises(ParamsError, match=r"images\.safetensors does not hold the weights of tiny-clip: "):
        open_encoder(section)
