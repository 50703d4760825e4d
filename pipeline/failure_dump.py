"""What is kept of a run whose loss was not finite: enough to see which images and which term, and to try it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from models.ranks import rank_count
from pipeline.artifacts import whole_folder, write_file, write_json
from pipeline.dataset import AnyImages
from pipeline.step import Step, own_rows
from pipeline.watch import Failure, Watch


def dump_failure(
    folder: Path, failure: Failure, watch: Watch, step: Step, train: AnyImages, facts: dict[str, Any]
) -> None:
    """Write `folder` whole, in place of an older one.

    failure.json: step, terms, facts, the parts of the steps before, the sample ids of the batch. tensors.safetensors: the
    views of the batch as the networks saw them, uint8 [views,b,3,H,W], and the run's state when it was stopped. Of several
    ranks this rank's views, before any mix.
    """
    tensors = dict(step.state())
    content = {"step": failure.step + 1, "terms": failure.terms, **facts, "sample_ids": []}
    for number, inputs in watch.inputs:
        if number == failure.step:
            content["sample_ids"] = [train.sample_ids[i] for i in inputs.chosen.tolist()]
            own = own_rows(inputs)
            pixels = train.pixels(own.chosen, own.draws) if train.images is None else None
            # This rank is alone here: of a mix the partners on other ranks cannot be asked for.
            mix = inputs.mix if rank_count() == 1 else None
            tensors["views"] = step.views(replace(inputs, pixels=pixels, mix=mix).to(step.device))[0]
    # JSON has no NaN: such a value stands as text.
    content["recent"] = [
        {name: value if torch.isfinite(torch.tensor(value)) else str(value) for name, value in parts.items()}
        for parts in watch.recent(failure.step)
    ]
    with whole_folder(folder) as partial:
        write_file(
            partial / "tensors.safetensors",
            safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}),
        )
        write_json(partial / "failure.json", content)
