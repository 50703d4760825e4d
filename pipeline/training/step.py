"""One optimiser step: random numbers are drawn on the CPU, everything else runs on the device without a copy to the host."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.class_sampler import ClassSampler
from models.distributed import average_gradients, gather_batch, rank, rank_count
from models.losses.class_loss import Mixed
from models.networks.activation_checkpointing import recompute_blocks
from models.networks.ema import WeightAverage
from models.objectives.objective import Objective
from pipeline.augment import (
    Draws,
    MixDraws,
    apply_crops,
    apply_mix,
    apply_views,
    draw_crops,
    draw_mix,
    draw_stored,
    draw_views,
    take_stored,
)
from pipeline.data.dataset import AnyImages, Normalisation
from pipeline.features.stored import FeatureImages
from pipeline.params import EngineParams, ImageParams, TrainingParams
from pipeline.segmentation.dataset import LabelledImages
from pipeline.segmentation.stream import LabelledStream
from pipeline.shared.host_memory import copy_to_device
from pipeline.training.optimiser import Optimiser


@dataclass(frozen=True)
class StepInputs:
    """Inputs of a step: indices of a global batch of B images in the training split, int64 [B], and random numbers.

    pixels: for a stream, uint8 [b,3,H,W] of this rank's share of the batch, or [b,views,3,H,W] if views are cut from
    the originals; None if the images are on the device.
    """

    chosen: Tensor
    draws: Draws
    mix: MixDraws | None
    pixels: Tensor | None = None

    def to(self, device: torch.device) -> StepInputs:
        """Copy to a device; asynchronous, through pinned memory, for a GPU."""
        mix = None if self.mix is None else self.mix.to(device)
        pixels = None if self.pixels is None else self.pixels.to(device, non_blocking=True)
        return StepInputs(copy_to_device(self.chosen, device), self.draws.to(device), mix, pixels)

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        mix = self.mix
        mixed = [] if mix is None else [t for t in (mix.partner, mix.share, mix.box) if t is not None]
        pixels = [] if self.pixels is None else [self.pixels]
        return [self.chosen, *self.draws.tables, *mixed, *pixels]


class Step:
    """Training step of a run: views of the batch, loss of the objective, optimiser, moving average of the weights.

    precision: the dtype of convolutions and matrix products; norms, softmax and losses are always float32. The images
    are on the device as uint8, or are part of the inputs. With several ranks, each processes its share of the batch,
    and gradients are averaged. With gradient accumulation, a rank processes its share in micro-batches whose gradients
    are summed. checkpoint_activations: see models.networks.activation_checkpointing; applies to the trained network.
    """

    def __init__(
        self,
        objective: Objective,
        params: TrainingParams,
        image: ImageParams,
        train: AnyImages,
        device: torch.device,
        precision: torch.dtype = torch.float32,
        checkpoint_activations: bool = False,
    ) -> None:
        self.objective = objective
        self.device = device
        self.precision = precision
        self.optimiser = Optimiser(objective, params, objective.model.backbone.rate_factors())
        self.average = WeightAverage(objective.model, params.ema_decay) if params.ema_decay else None
        if checkpoint_activations:
            recompute_blocks(objective.model.backbone)
        self._parts = params.accumulate
        # With accumulation the gradients are averaged over the ranks once, after the last micro-batch, and not by DDP.
        alone = rank_count() == 1 or self._parts > 1
        self._module: nn.Module = objective if alone else shared_gradients(objective)
        self._augment = params.augment
        self._images = None if train.images is None else train.images.to(device)
        # Number of stored views of each image, for features. 0 for images: their views are drawn and cropped in this class.
        self._stored = train.images.shape[1] if isinstance(train, FeatureImages) else 0
        self._crops = train.augment if isinstance(train, LabelledImages | LabelledStream) else None
        self._sizes = train.sizes.to(device) if isinstance(train, LabelledImages) else None
        self.labels, self._size, self._mean = train.labels.to(device), image.size, image.mean
        self.normalise = Normalisation(image, device)

    def draw(self, chosen: Tensor, generator: torch.Generator) -> StepInputs:
        """Draw the inputs of a step for the images `chosen` int64 [B], on the CPU; 2B images if the objective has a companion.

        Pixels of a stream are added by the caller.
        """
        if self.objective.companion is not None:
            chosen = torch.stack([chosen, self._companions.draw(len(chosen), generator)], 1).flatten()
        if self._stored:
            return StepInputs(chosen, draw_stored(len(chosen), self.objective.views, self._stored, generator), None)
        if self._crops:
            return StepInputs(chosen, draw_crops(len(chosen), self._crops, generator), None)
        size = self._size
        draws = draw_views(len(chosen), size, size, self.objective.views, self._augment, generator)
        return StepInputs(chosen, draws, draw_mix(len(chosen), size, size, self._augment, generator))

    @functools.cached_property
    def _companions(self) -> ClassSampler:
        power = self.objective.companion
        assert power is not None
        return ClassSampler(self.labels.cpu(), self.objective.model.classes, power)

    def labelled_crops(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """This rank's crops uint8 [1,b,3,h,w] and their label maps uint8 [b,h,w], of task segmentation."""
        own = own_rows(inputs)
        if own.pixels is not None:  # of a stream, which has cropped them
            return own.pixels[None, :, :3], own.pixels[:, 3]
        pairs = self._images[own.chosen]
        return apply_crops(
            pairs[:, :3], pairs[:, 3], own.draws, self._crops, self._sizes[own.chosen], mean=tuple(self._mean)
        )

    def views(self, inputs: StepInputs) -> tuple[Tensor, Mixed | None]:
        """This rank's views uint8 [views,b,3,H,W], or features [views,b,D], and mixed labels of the classifier view or None."""
        if self._crops:
            return self.labelled_crops(inputs)[0], None
        own = own_rows(inputs)
        pixels = self._images.index_select(0, own.chosen) if own.pixels is None else own.pixels
        if self._stored:
            return take_stored(pixels, own.draws), None
        views = apply_views(pixels, own.draws, self._augment)
        if own.mix is None:
            return views, None
        # The partner may be an image of another rank.
        views[0] = apply_mix(views[0], own.mix, gather_batch(views[0]))
        return views, Mixed(self.labels[inputs.chosen[own.mix.partner]], own.mix.share)

    def __call__(self, inputs: StepInputs) -> dict[str, Tensor]:
        """Run the step on inputs on the device.

        Returns the objective's losses and `gradient_norm`, detached scalars on the device.
        """
        chosen = own_rows(inputs).chosen
        if self._crops:
            return self.descend(*self.labelled_crops(inputs), chosen, None)
        views, mixed = self.views(inputs)
        return self.descend(views, self.labels[chosen], chosen, mixed)

    def descend(self, views: Tensor, target: Tensor, chosen: Tensor, mixed: Mixed | None) -> dict[str, Tensor]:
        """Run the step on finished views: uint8 [views,b,3,H,W], with their labels and indices in the split, int64 [b].

        For task segmentation, target are label maps uint8 [b,H,W].
        """
        self.objective.train()
        self.optimiser.zero_gradients()
        if self._parts > 1:
            parts = self._accumulate(views, target, chosen, mixed)
        else:
            with self._autocast():
                parts = self._module(self.normalise(views), target, chosen, mixed)
            parts["loss"].backward()
        norm = self.optimiser.descend()
        self.objective.after_step()
        if self.average is not None:
            self.average.update(self.objective.model)
        return {**{name: part.detach() for name, part in parts.items()}, "gradient_norm": norm}

    def _accumulate(self, views: Tensor, target: Tensor, chosen: Tensor, mixed: Mixed | None) -> dict[str, Tensor]:
        """Compute the gradient of the batch from its micro-batches in sequence; returns the means of their losses."""
        size = len(target) // self._parts
        runs = [(start, start + size) for start in range(0, len(target), size)]
        with self._autocast():
            seen = (self.normalise(views[:, start:stop]) for start, stop in runs)
            whole = self.objective.whole_batch(seen, target, chosen)
        losses = []
        for start, stop in runs:
            part = None if mixed is None else mixed.rows(start, stop)
            with self._autocast():
                parts = self.objective(
                    self.normalise(views[:, start:stop]), target[start:stop], chosen[start:stop], part, whole
                )
            (parts["loss"] / self._parts).backward()
            losses.append({name: part.detach() for name, part in parts.items()})
        if whole is not None:
            whole.backward()
        average_gradients(self.optimiser.parameters)
        return {name: torch.stack([parts[name] for parts in losses]).mean(0) for name in losses[0]}

    def _autocast(self) -> torch.autocast:
        half = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision if half else None, enabled=half, cache_enabled=False)

    def state(self) -> dict[str, Tensor]:
        """All tensors that a step changes, by name (references, not copies). Without the frozen teacher."""
        average = {} if self.average is None else self.average.state_dict()
        return {
            **{f"objective.{name}": tensor for name, tensor in trained_state(self.objective).items()},
            **{f"optimiser.{i}": tensor for i, tensor in enumerate(self.optimiser.state())},
            **{f"average.{name}": tensor for name, tensor in average.items()},
        }

    def load_state(self, state: dict[str, Tensor]) -> list[str]:
        """Copy the tensors of a `state` in place; returns the names that do not fit.

        If there are any, nothing is changed.
        """
        own = self.state()
        wrong = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
        wrong += [name for name in state if name not in own]
        if not wrong:
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(state[name])
        return wrong


def own_indices(batches: Tensor) -> Tensor:
    """This rank's share of each global batch of indices: [...,B] → [...,b]."""
    share = batches.shape[-1] // rank_count()
    return batches[..., rank() * share : (rank() + 1) * share]


def own_rows(inputs: StepInputs) -> StepInputs:
    """Inputs for this rank's share of the global batch.

    Mix partners stay indices in the global batch; pixels are unchanged.
    """
    share = len(inputs.chosen) // rank_count()
    start, stop = rank() * share, (rank() + 1) * share
    mix = None if inputs.mix is None else inputs.mix.rows(start, stop)
    return replace(inputs, chosen=inputs.chosen[start:stop], draws=inputs.draws.rows(start, stop), mix=mix)


def shared_gradients(objective: nn.Module) -> DistributedDataParallel:
    """The objective in DDP, which averages gradients. Buffers need no broadcast: every rank enqueues the gathered batch."""
    # Newer PyTorch releases renamed the argument and warn about the old name.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    switch = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(objective, **switch)


def trained_state(objective: nn.Module) -> dict[str, Tensor]:
    """State of an objective that training changes: its state_dict without the frozen teacher."""
    return {name: value for name, value in objective.state_dict().items() if not name.startswith("teacher.")}


def draw_ahead(step: Step, batches: Tensor, generator: torch.Generator) -> Iterator[tuple[StepInputs, Tensor]]:
    """Yield the inputs of each batch and the generator state after drawing them.

    A stream draws ahead of the steps. The run's generator must not advance ahead, because a checkpoint stores its
    state.
    """
    ahead = torch.Generator()
    ahead.set_state(generator.get_state())
    for chosen in batches:
        yield step.draw(chosen, ahead), ahead.get_state()


def precision_of(engine: EngineParams, device: torch.device) -> torch.dtype:
    """engine.precision as a dtype: `auto` is bfloat16 on CUDA, where it is fast, and float32 elsewhere."""
    half = engine.precision == "bfloat16" or (engine.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32
