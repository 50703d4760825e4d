"""Stage `embed`: features once per image, resumed after a kill, extended by new images, never half-written."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pipeline.embed
import pipeline.split
from pipeline.features.stored import load_features
from pipeline.model_io.encoder import LoadedEncoder
from pipeline.shared.artifacts import EMBEDDINGS, SPLIT
from pipeline.shared.errors import DataError, StageError
from tests.support.making import data_params, folder, png, write
from tests.support.small_encoder import check_features, files_from_scratch, small_shards, split_folder, stored_files


@pytest.fixture(name="weights")
def _weights(tmp_path, monkeypatch):
    return small_shards(tmp_path, monkeypatch)


def run_interrupted(params, monkeypatch, batches):
    """Run the stage and interrupt it after the encoder has computed that many batches."""
    whole, remaining = LoadedEncoder.features, iter(range(batches))

    def stopping(*arguments):
        if next(remaining, None) is None:
            raise KeyboardInterrupt
        return whole(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LoadedEncoder, "features", stopping)
        pipeline.embed.run(params)


def test_only_new_images_are_computed(weights):
    params = split_folder(weights)
    pipeline.embed.run(params)
    before = load_features(params, "train")
    assert pipeline.embed.run(params).computed == 0
    write(weights.parent / "images/a/100.png", png(1000))  # added
    (weights.parent / "images/a/001.png").unlink()  # removed
    write(weights.parent / "images/b/000.png", png(1001))  # replaced
    pipeline.split.run(params)
    with pytest.raises(StageError, match="holds features of other images than data/split; run `dvc repro embed`"):
        [load_features(params, split) for split in ("train", "validation", "test")]
    assert pipeline.embed.run(params).computed == 2
    after = load_features(params, "train")
    rows = {name: row for row, name in enumerate(before.sample_ids)}
    common = [(rows[name], row) for row, name in enumerate(after.sample_ids) if name in rows and "b/000" not in name]
    assert common
    assert all(torch.equal(before.images[old], after.images[new]) for old, new in common)


def test_a_run_that_stops_anywhere_resumes_to_the_same_bytes(weights, monkeypatch):
    params = split_folder(weights, {"encoder.views": 1})
    pipeline.embed.run(params)
    expected = stored_files()
    for batches in range(0, 14, 2):
        shutil.rmtree(EMBEDDINGS)
        run_interrupted(params, monkeypatch, batches)
        assert not EMBEDDINGS.exists()
        pipeline.embed.run(params)
        assert stored_files() == expected


def test_a_run_that_stops_before_the_split_changes_gives_each_image_its_own_feature(weights, monkeypatch):
    params = split_folder(weights)
    run_interrupted(params, monkeypatch, 6)  # 4 batches per shard of 16 images
    for number in range(3):  # sorted before the other images, so the index of every row changes
        write(weights.parent / f"images/a/0-{number}.png", png(1000 + number))
    pipeline.split.run(params)
    assert pipeline.embed.run(params).computed == 52 - 16
    check_features(params)


@pytest.mark.parametrize("content", [png(1000), png(1)[:60], b""], ids=["replaced", "damaged", "empty"])
def test_an_image_that_has_changed_since_the_split_is_refused_and_its_feature_is_not_stored(weights, content):
    params = split_folder(weights)
    path = weights.parent / "images/a/007.png"
    before = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a/007\.png: has changed since the images were split; run `dvc repro` again"):
        pipeline.embed.run(params)
    path.write_bytes(before)
    pipeline.embed.run(params)
    resumed = stored_files()
    assert files_from_scratch(params) == resumed


def test_a_second_run_at_the_same_time_is_refused_and_the_first_one_finishes(weights, monkeypatch):
    params = split_folder(weights)
    whole, refused = LoadedEncoder.features, []

    def twice(*arguments):
        if not refused:
            code = f"import pipeline.embed, sys; sys.argv = ['embed', '--params', {str(weights.parent / 'p.yaml')!r}]; "
            (weights.parent / "p.yaml").write_text(json.dumps(params.model_dump(mode="json")))
            command = [sys.executable, "-c", code + "sys.exit(pipeline.embed.stage_main(pipeline.embed.run, ''))"]
            refused.append(subprocess.run(command, capture_output=True, text=True, check=False))
        return whole(*arguments)

    monkeypatch.setattr(LoadedEncoder, "features", twice)
    assert pipeline.embed.run(params).computed == 49
    assert refused[0].returncode == 1
    assert refused[0].stderr.endswith("another `embed` of this project is running; wait until it has finished\n")


@pytest.mark.faults
def test_a_process_that_is_killed_at_any_moment_resumes_to_the_same_bytes(weights):
    params = split_folder(weights, {"encoder.views": 1})
    started = time.monotonic()
    pipeline.embed.run(params)
    seconds, expected = time.monotonic() - started, stored_files()
    draw, unfinished = random.Random(17), EMBEDDINGS.with_name(".embeddings.unfinished")
    shards_at_kill = []
    for _ in range(20):
        shutil.rmtree(EMBEDDINGS, ignore_errors=True)
        child = os.fork()
        if not child:
            pipeline.embed.run(params)
            os._exit(0)
        time.sleep(draw.uniform(0, 1.2 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        shards_at_kill.append(len(list(unfinished.glob("*.safetensors"))))
        pipeline.embed.run(params)
        assert stored_files() == expected
    whole = len([name for name in expected if str(name).endswith(".safetensors")])
    assert any(0 < count < whole for count in shards_at_kill), (
        f"no kill between two shards: {shards_at_kill} of {whole}"
    )


def test_a_full_disk_leaves_the_old_features_and_no_half_written_file(weights, monkeypatch):
    params = split_folder(weights)
    pipeline.embed.run(params)
    expected = stored_files()
    write(weights.parent / "images/a/100.png", png(1000))
    pipeline.split.run(params)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("serving.shared.atomic.os.fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        pipeline.embed.run(params)
    assert Path(caught.value.filename).match(".embeddings.unfinished/train-*.safetensors")
    assert stored_files() == expected
    assert list(EMBEDDINGS.with_name(".embeddings.unfinished").iterdir()) == []


def test_a_file_limit_in_the_middle_is_one_line_and_the_next_run_continues_after_the_finished_shards(
    weights, monkeypatch, capsys
):
    params = split_folder(weights)
    (weights.parent / "p.yaml").write_text(json.dumps(params.model_dump(mode="json")))
    whole, calls, limits = LoadedEncoder.features, [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments):
        calls.append(1)
        if len(calls) == 5:  # the first batch of the second shard
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes; a shard has 2,600
        return whole(*arguments)

    monkeypatch.setattr(LoadedEncoder, "features", limited)
    try:
        code = pipeline.embed.stage_main(pipeline.embed.run, "", ["--params", str(weights.parent / "p.yaml")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = r"embed: \S+/\.embeddings\.unfinished/train-\w{64}\.safetensors: File too large\n"
    assert code == 1 and re.fullmatch(line, capsys.readouterr().err)
    assert not EMBEDDINGS.exists() and len(list(EMBEDDINGS.with_name(".embeddings.unfinished").iterdir())) == 1
    monkeypatch.setattr(LoadedEncoder, "features", whole)
    assert pipeline.embed.run(params).computed == 49 - 16
    resumed = stored_files()
    assert resumed == files_from_scratch(params)


def test_without_an_encoder_nothing_is_computed_and_the_output_never_changes(weights):
    params = data_params(folder(weights.parent / "images", {"a": 6, "b": 6}))
    assert pipeline.embed.run(params).images == 0 and not SPLIT.exists()
    assert stored_files() == {"index.json": b'{\n  "encoder": null\n}\n'}


def test_without_an_encoder_the_stage_does_not_load_pytorch():
    code = "import pipeline.embed, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
