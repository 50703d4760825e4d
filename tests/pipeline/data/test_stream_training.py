"""Training on a stream: bit-identical to training from memory, exact resume, each sample once over two ranks."""

from __future__ import annotations

import random
import weakref

import pytest
import safetensors.torch
import torch

from pipeline import split
from pipeline.data.dataset import AnyImages, load_images, training_images
from pipeline.data.stream import ImageStream
from pipeline.params import AugmentParams, ImageParams, StreamParams
from pipeline.shared.errors import StageError
from pipeline.training.engine import Training
from pipeline.training.non_finite import WINDOW
from pipeline.training.resume import RunFolder
from pipeline.training.step import Step
from tests.support.making import data_params, folder, write
from tests.support.small_training import CPU, PowerCut, in_ranks, made_images, made_training

pytestmark = pytest.mark.slow

IMAGE = ImageParams(size=8, resize_to=8, mean=[0.5] * 3, std=[0.25] * 3)
MIXED = {"ema_decay": 0.9, "augment": AugmentParams(crop_padding=1, flip=True, cutout=2, mix="cutmix")}
CUT = AugmentParams(crop="resized", crop_padding=0, flip=True, cutout=2, mix="cutmix")
RECIPES = {"teacher": {}, "student": {}, "mixed": MIXED, "cut": {"augment": CUT}}
STAGES = {"mixed": "student", "cut": "student"}


def params_of(source, **stream):
    made = data_params(source, validation_per_class=2)
    streamed = StreamParams(**{"mode": "on", "workers": 2, "prefetch": 2, **stream})
    return made.model_copy(update={"image": IMAGE, "stream": streamed})


@pytest.fixture
def data(tmp_path):
    """Params and splits of three classes with 16x16 pixels, which a stream resizes to half."""
    params = params_of(folder(tmp_path / "source", {"a": 24, "b": 12, "c": 8}), decode="exact")
    split.run(params, tmp_path / "split")
    return params, tmp_path / "split"


def streams(data) -> tuple[AnyImages, AnyImages]:
    return tuple(
        ImageStream(data[0].data, data[0].image, data[0].stream, name, CPU, data[1]) for name in ("train", "validation")
    )


def in_windows(data) -> tuple[AnyImages, AnyImages]:
    """Return train and validation streams ordered as for a table: row groups of four, two groups per window."""
    train, validation = streams(data)
    from pipeline.sources import Groups

    train.groups = Groups(torch.arange(len(train)).numpy() // 4, torch.full((8,), 10).numpy())
    train.window = 20
    return train, validation


def originals(data, mode: str = "on") -> tuple[AnyImages, AnyImages]:
    """Return train and validation images of a stage whose views are cropped from the 16x16 pixels."""
    params = data[0].model_copy(update={"stream": data[0].stream.model_copy(update={"mode": mode})})
    train, validation, _ = training_images(params, CPU, data[1], augment=CUT, views=3)
    return train, validation


def training_of(name: str, run_folder=None) -> Training:
    stage = STAGES.get(name, name)
    return made_training(stage, run_folder=run_folder, checkpoint_seconds=0.0, epochs=3, **RECIPES[name])


def result(training: Training, images: tuple[AnyImages, AnyImages]) -> tuple[dict[str, torch.Tensor], list]:
    """Return the final state of a run and its history, without times."""
    history = training.run(*images)
    timed = ("images_per_second", "memory_mib", "data_wait")
    return training.step.state(), [{k: v for k, v in record.items() if k not in timed} for record in history]


def same(actual, expected) -> bool:
    return actual[0].keys() == expected[0].keys() and all(
        torch.equal(tensor, expected[0][name]) for name, tensor in actual[0].items()
    )


@pytest.mark.parametrize("name", ["teacher", "student", "mixed"])
def test_training_on_a_stream_is_bit_identical_to_training_from_memory(name, data):
    held = tuple(load_images(data[0].data, data[0].image, part, data[1]) for part in ("train", "validation"))
    expected, actual = result(training_of(name), held), result(training_of(name), streams(data))
    assert same(actual, expected) and actual[1] == expected[1]


def test_training_on_crops_does_not_depend_on_cached_originals(data):
    runs = [result(training_of("cut"), originals(data, mode)) for mode in ("on", "off", "auto")]
    assert all(same(run, runs[0]) and run[1] == runs[0][1] for run in runs)
    assert not same(runs[0], result(training_of("cut"), streams(data))), "as the squares of the test view do not"


def test_a_run_from_memory_keeps_only_the_draws_of_the_last_steps(monkeypatch):
    drawn, step, most = [], Step.__call__, []

    def counted(self, inputs):
        drawn.append(weakref.ref(inputs.draws.tables[0]))
        most.append(sum(table() is not None for table in drawn))
        return step(self, inputs)

    monkeypatch.setattr(Step, "__call__", counted)
    made_training(batch_size=2, epochs=1).run(made_images(200), made_images(3))
    assert len(most) == 100 and max(most) <= WINDOW + 1


@pytest.mark.parametrize(
    ("name", "images"),
    [(name, images) for name in ("teacher", "mixed") for images in (streams, in_windows)] + [("cut", originals)],
)
def test_a_streamed_run_resumed_many_times_ends_as_an_uninterrupted_one(name, images, data, tmp_path):
    expected = result(training_of(name), images(data))
    run_folder = RunFolder(tmp_path / "unfinished", "run")
    draw = random.Random(name)
    for _ in range(4):
        training, done = training_of(name, run_folder), []
        forward, last = training.objective.forward, draw.randint(0, 2)

        def counted(*arguments, forward=forward, done=done, last=last):
            if len(done) == last:
                raise PowerCut
            done.append(1)
            return forward(*arguments)

        training.objective.forward = counted
        with pytest.raises(PowerCut):
            training.run(*images(data))
    actual = result(training_of(name, run_folder), images(data))
    assert same(actual, expected) and actual[1] == expected[1]


def test_an_epoch_record_has_the_wait_and_the_replaced_images(data, capsys):
    params, where = data
    train = ImageStream(params.data, params.image, params.stream, "train", CPU, where, replace_bad=True)
    write(where.parent / "source" / train.references[0], b"spoilt")
    history = training_of("teacher").run(train, streams(data)[1])
    assert all(0 <= record["data_wait"] < 1 for record in history)
    replaced = [record["images_replaced"] for record in history]
    # An epoch has 32 of 33 images, so one of three epochs may omit the damaged image.
    assert set(replaced) <= {0, 1} and sum(replaced) >= 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "replaced" in line]
    assert len(lines) == sum(replaced)
    assert lines[0].startswith("teacher  1 image could not be read; replaced by others of their class, the first 1: ")


def test_rank_0_prints_the_images_that_other_ranks_replaced(data, capsys, monkeypatch):
    train, validation = streams(data)
    record = train.epoch_record
    monkeypatch.setattr(train, "epoch_record", lambda seconds: record(seconds) | {"images_replaced": 2})
    training_of("teacher").run(train, validation)
    lines = [line for line in capsys.readouterr().out.splitlines() if "replaced" in line]
    assert len(lines) == 3
    assert lines[0].startswith("teacher  2 images could not be read by other processes; replaced by others")


@pytest.mark.parametrize("images", [streams, originals])
def test_the_views_of_a_batch_that_failed_are_read_again_for_the_dump(images, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = RECIPES["cut"] if images is originals else {}
    training = made_training("student", learning_rate=1e30, **changes)
    with pytest.raises(StageError, match=r"not finite in epoch 1, step \d"):
        training.run(*images(data))
    dumped = safetensors.torch.load_file(tmp_path / "artifacts/failures/student/tensors.safetensors")
    assert dumped["views"].shape == (3, 8, 3, 8, 8)


def seen_by_a_rank(source, where, name) -> list:
    """Return the sample ids whose pixels this rank reads, and the losses of its epochs."""
    data = params_of(source, decode="exact"), where
    train, validation = originals(data) if name == "cut" else streams(data)
    read: list[int] = []
    decode = train.decode
    train.decode = lambda indices, *rest: read.extend(indices) or decode(indices, *rest)
    training = made_training("student", epochs=1, **RECIPES[name])
    history = training.run(train, validation)
    return [sorted(read), history[0]["loss"], history[0]["validation_accuracy"]]


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", ["student", "cut"])
def test_two_ranks_see_each_sample_once_and_train_as_one(name, data, tmp_path):
    source, where = tmp_path / "source", data[1]
    one, two = in_ranks(seen_by_a_rank, tmp_path, source, where, name)
    alone = seen_by_a_rank(source, where, name)
    assert len(one[0]) == len(two[0]) == len(alone[0]) / 2
    assert sorted(one[0] + two[0]) == alone[0] == sorted(set(alone[0]))
    assert one[1:] == two[1:] and one[1] == pytest.approx(alone[1], rel=1e-4)
