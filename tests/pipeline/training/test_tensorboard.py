"""Optional TensorBoard files: every metric of every epoch, read with TensorBoard's reader."""

from __future__ import annotations

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.shared.errors import ParamsError
from pipeline.training.history import write_scalars
from tests.support.small_training import made_images, made_training


def read_back(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_each_epoch_is_there_once_also_after_a_run_that_went_on(tmp_path):
    seen = []
    training = made_training(epochs=3)
    training.on_epoch = lambda history: (seen.append(len(history)), write_scalars(tmp_path, history))
    history = training.run(made_images(16), made_images(6))
    assert seen == [1, 2, 3]
    events = read_back(tmp_path)
    assert set(events.Tags()["scalars"]) == set(history[0]) - {"epoch"}
    for name in ("loss", "validation_accuracy"):
        actual = events.Scalars(name)
        assert [event.step for event in actual] == [1, 2, 3]
        assert [event.value for event in actual] == pytest.approx([record[name] for record in history], rel=1e-6)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_tensorboard_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ParamsError,
        match=r"engine\.tensorboard is true, but tensorboard is missing; run `pip install -e '\.\[monitor\]'`",
    ):
        write_scalars(tmp_path, [{"epoch": 1, "loss": 1.0}])
