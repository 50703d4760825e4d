"""Open the text encoder that params.yaml names; those of open_clip and transformers, from local weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from pipeline.params import TextParams
from pipeline.shared.errors import ParamsError
from pipeline.text.encoder import TextEncoder, checked_file, not_installed, pooled
from pipeline.text.onnx_encoder import onnx_encoder

HUB_FILES = ("*.json", "*.txt", "model.safetensors")  # of a transformers model; no code and no pickle


def open_encoder(text: TextParams) -> TextEncoder:
    """Open the encoder of section `text`.

    Raises ParamsError that names the key for: a missing file or package, another sha256, and weights that are damaged or
    of another kind of model.
    """
    return {"onnx": onnx_encoder, "open_clip": _open_clip, "transformers": _transformers}[text.encoder](text)


def _open_clip(text: TextParams) -> TextEncoder:
    try:
        import open_clip
        import torch
    except ImportError as error:
        raise not_installed(text, error) from None
    from pipeline.model_io.pretrained import read_weights

    # Its other names are addresses: `hf-hub:` would use the network whatever text.download is, `local-dir:` a folder.
    if text.model not in open_clip.list_models():
        raise ParamsError(f"text.model is {text.model!r}, which open_clip does not have; expected one such as RN50")
    config = open_clip.get_model_config(text.model)
    if foreign := {"hf_model_name", "hf_tokenizer_name"} & config["text_cfg"].keys():
        raise ParamsError(
            f"text.model is {text.model!r}, whose {foreign.pop()} open_clip would download; use encoder transformers or onnx"
        )
    path, sha256 = checked_file(text.file, text.sha256, text.download)
    weights = read_weights(path, sha256, "text.file", "text.sha256")
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random; they are loaded next
    try:
        network = open_clip.create_model(text.model, pretrained=None).eval()
    finally:
        logging.disable(logging.NOTSET)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ParamsError(f"text.file: {path} does not hold the weights of {text.model}: {reason}") from None
    tokenizer = open_clip.get_tokenizer(text.model)
    limit = min(text.max_tokens or tokenizer.context_length, tokenizer.context_length)

    def lengths(sentences: Sequence[str]) -> list[int]:
        return [len(tokenizer.encode(sentence)) + 2 for sentence in sentences]

    def features(sentences: Sequence[str]) -> np.ndarray:
        # The text tower takes context_length tokens; zeros follow the last one of a shorter sentence.
        tokens = torch.nn.functional.pad(
            tokenizer(list(sentences), context_length=limit), (0, tokenizer.context_length - limit)
        )
        with torch.inference_mode():
            return network.encode_text(tokens).float().numpy()

    record = {"encoder": "open_clip", "model": text.model, "sha256": sha256, "max_tokens": limit}
    return TextEncoder(record, limit, lengths, features)


def _transformers(text: TextParams) -> TextEncoder:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise not_installed(text, error) from None
    folder = _model_folder(text)
    _, sha256 = checked_file(str(folder / "model.safetensors"), text.sha256, False)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        network, loading = transformers.AutoModel.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ParamsError(f"text.file is {text.file!r}, which transformers cannot load: {reason}") from None
    # The library only warns about missing weights, and draws them at random. A feature does not need those of a pooler.
    if missing := [name for name in sorted(loading["missing_keys"]) if "pooler" not in name]:
        raise ParamsError(
            f"text.file is {text.file!r}: its model.safetensors has no {missing[0]}; is it of this model?"
        )
    network.eval()
    config = getattr(network.config, "text_config", network.config)
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512))
    limit = min(text.max_tokens or longest, longest)
    # SigLIP's feature is that of the last position, and it was trained with inputs of full length.
    padding = "max_length" if "siglip" in network.config.model_type else True

    def lengths(sentences: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(sentences), truncation=False, verbose=False)["input_ids"]]

    def features(sentences: Sequence[str]) -> np.ndarray:
        tokens = tokenizer(list(sentences), truncation=True, max_length=limit, padding=padding, return_tensors="pt")
        with torch.inference_mode():
            if hasattr(network, "get_text_features"):
                result = network.get_text_features(**tokens)
                # From release 5 on an object; its pooled vector is projected.
                return (result if isinstance(result, torch.Tensor) else result.pooler_output).float().numpy()
            states = network(**tokens).last_hidden_state
        return pooled(states.float().numpy(), tokens["attention_mask"].numpy().astype(np.float32), text.pooling)

    record = {
        "encoder": "transformers", "model": folder.name if folder.is_dir() else text.file, "sha256": sha256,
        "pooling": text.pooling, "max_tokens": limit,
    }  # fmt: skip
    return TextEncoder(record, limit, lengths, features)


def _model_folder(text: TextParams) -> Path:
    """The folder of a transformers model, or of its copy in the hub's cache."""
    if not text.file.startswith("hf://"):
        return Path(text.file)
    from pipeline.model_io.pretrained import locate

    first = locate(f"{text.file}/config.json", text.download, "text.file")
    if text.download:
        import huggingface_hub
        from huggingface_hub.errors import HTTPError

        repository, _, revision = text.file.removeprefix("hf://").partition("@")
        try:
            huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(HUB_FILES))
        except (HTTPError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ParamsError(
                f"text.file: {text.file}: {reason}; check the address and the network, or give a folder as text.file"
            ) from None
    return first.parent
