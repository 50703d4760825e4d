"""Estimate the GPU memory of one training step without a GPU and without images.

The step runs on fake tensors (shapes and dtypes without data, as in torch.compile), and the lifetime of each tensor is
recorded. Not included: the CUDA context (about 0.5 GiB), workspaces of libraries, and fragmentation of the allocator;
10 % of the card is reserved for them. The unfused contrast loss is counted; the fused kernel takes less.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from models.networks.adapters import with_encoder
from models.networks.backbones import build_backbone
from models.networks.ema import WeightAverage
from models.objectives.objective import Objective
from models.objectives.teacher import TeacherObjective
from pipeline.augment import cuts_originals
from pipeline.data.class_prior import Prior, load_prior
from pipeline.data.dataset import Images
from pipeline.data.published import PUBLISHED
from pipeline.data.stream_decoding import enough_pixels
from pipeline.model_io.checkpoint import build_model
from pipeline.model_io.encoder import describe
from pipeline.params import Params
from pipeline.preparation.live_tensors import LiveMemory
from pipeline.shared.artifacts import PRIOR
from pipeline.shared.errors import ParamsError
from pipeline.training.method_setup import class_loss
from pipeline.training.run import check_recipe, model_config
from pipeline.training.step import Step, precision_of
from pipeline.training.student_setup import student_objective, tuned_backbone, weights_of

GIB = 2**30
ALLOWANCE = 0.1  # of the card, for what is not counted


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a step in bytes: the peak, its parts by kind, and the largest amount of each kind.

    images: bytes of the training split; with originals an upper bound, in the host's memory instead of the device's.
    """

    peak: int
    at_peak: dict[str, int]
    largest: dict[str, int]
    images: int
    originals: bool

    def fits(self, card: float) -> bool:
        """Whether a step fits a GPU with `card` bytes, with the allowance for uncounted memory left free."""
        return self.peak <= (1 - ALLOWANCE) * card


def estimate_memory(params: Params, stage: str, prior: Prior) -> MemoryEstimate:
    """Memory of one step of stage `teacher` or `student` on CUDA, of one process.

    The inputs are images; a student that tunes the encoder trains on images too. Raises ParamsError as the stage does.
    """
    with fake_step(params, stage, prior, tuned_record(params, stage)) as step:
        live = LiveMemory()
        _declare_state(live, step)
        live.follow_gradients(step.objective.parameters())
        with live:
            views, target, chosen = fake_batch(step, params, stage)
            live.declare("views", [views])
            with _label_saved_tensors(live, step.objective):
                step.descend(views, target, chosen, None)
    section, size = getattr(params, stage), params.image.size
    originals = cuts_originals(step.objective.views, section.augment)
    pixels = int(enough_pixels(params.image, section.augment.crop_scale)) if originals else size * size
    images = sum(prior.counts) * 3 * pixels
    return MemoryEstimate(live.peak, live.at_peak, dict(live.largest), images, originals)


@contextlib.contextmanager
def fake_step(params: Params, stage: str, prior: Prior, encoder: dict[str, Any] | None = None) -> Iterator[Step]:
    """Context with the step of stage `teacher` or `student` on fake tensors, as on CUDA in one process.

    encoder: record of the encoder; None without one. The inputs are its stored features, or images if the stage tunes it.
    Raises ParamsError as the stage does.
    """
    check_recipe(params.teacher, params.student, prior)
    try:
        with torch.device("meta"):
            objective, average = _build_modules(params, stage, prior, encoder)
    except NotImplementedError:  # a network that computes its widths with tensors: torchvision's RegNet
        objective, average = _build_modules(params, stage, prior, encoder)
    # Fake tensors with device "cpu", because autocast does not support meta tensors.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in filter(None, (objective, average)):
            _to_fake_tensors(module.to(memory_format=torch.channels_last))
        # The average exists already, because fake tensors cannot be deep-copied.
        section = getattr(params, stage).model_copy(update={"ema_decay": 0.0})
        size = params.image.size
        no_images = Images(torch.zeros(0, 3, size, size, dtype=torch.uint8), torch.zeros(0).long(), [], [], None)
        precision = precision_of(params.engine, torch.device("cuda"))
        recompute = params.engine.checkpoint_activations
        step = Step(objective, section, params.image, no_images, torch.device("cpu"), precision, recompute)
        step.average = average
        yield step


def fake_batch(
    step: Step, params: Params, stage: str, encoder: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Views, labels and indices of a batch for `step.descend`, within `fake_step` of the same arguments."""
    batch, size = getattr(params, stage).batch_size, params.image.size
    batch *= 1 if step.objective.companion is None else 2
    shape, dtype = ((3, size, size), torch.uint8) if encoder is None else ((encoder["width"],), torch.float16)
    views = torch.zeros(step.objective.views, batch, *shape, dtype=dtype)
    return views, torch.zeros(batch, dtype=torch.int64), torch.arange(batch)


def _build_modules(
    params: Params, stage: str, prior: Prior, encoder: dict[str, Any] | None
) -> tuple[Objective, WeightAverage | None]:
    objective, decay = new_objective(params, stage, prior, encoder), getattr(params, stage).ema_decay
    return objective, WeightAverage(objective.model, decay) if decay else None


def new_objective(params: Params, stage: str, prior: Prior, encoder: dict[str, Any] | None = None) -> Objective:
    """The objective of a stage with random weights, also in a student's teacher; memory depends on sizes only."""
    sections, classes = (params.teacher, params.student), len(prior.classes)
    configs = [replace(model_config(section, params.image, classes, encoder), tune="none") for section in sections]
    if stage == "teacher":
        return TeacherObjective(
            build_model(configs[0], "teacher.backbone"),
            torch.tensor(prior.in_losses),
            params.teacher.adjustment,
            class_loss(params.teacher, prior),
        )
    model, teacher = build_model(configs[1], "student.backbone"), build_model(configs[0], "teacher.backbone")
    if params.student.tune != "none":  # as training/student_setup.py does
        assert encoder is not None
        network = build_backbone(f"timm/{encoder['model']}", encoder["size"])
        model.backbone = tuned_backbone(network, model.backbone, params.student)
        teacher.backbone = with_encoder(network, teacher.backbone)
    return student_objective(params.student, weights_of(params.student), prior, model, teacher)


def tuned_record(params: Params, stage: str) -> dict[str, Any] | None:
    """Record of the encoder that the stage tunes, without source and sha256; None for a stage that tunes none."""
    if params.encoder is None or stage == "teacher" or params.student.tune == "none":
        return None
    listed = describe(params.encoder)
    return {"name": listed.name, "model": listed.model, "size": params.image.size, "width": listed.width}


def _to_fake_tensors(module: nn.Module) -> None:
    """Replace parameters and buffers of a meta module by fake ones on the CPU; `to_empty` swaps, which they refuse."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="cpu")


def _declare_state(live: LiveMemory, step: Step) -> None:
    """Declare the tensors that exist before a step: weights, optimiser, queues and so on."""
    objective = step.objective
    kinds: dict[str, nn.Module | None] = {
        "frozen teacher": getattr(objective, "teacher", None),
        "momentum encoder": getattr(objective, "momentum_encoder", None),
        "queue": getattr(objective, "queues", None),
        "average of weights": step.average,
        "weights": objective,
    }
    for kind, module in kinds.items():
        if module is not None:
            live.declare(kind, [*module.parameters(), *module.buffers()])
    live.declare("optimiser", step.optimiser.state())


@contextlib.contextmanager
def _label_saved_tensors(live: LiveMemory, objective: Objective) -> Iterator[None]:
    """Context manager that labels tensors saved for the backward pass by the running module or by their shape."""
    running: list[str] = []
    modules = {"network": objective.model.backbone}
    if getattr(objective, "query_head", None) is not None:
        modules |= {"query head": objective.query_head, "key head": objective.key_head}
    hooks = []
    for name, module in modules.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    rows = len(objective.queues.row_class) if "key head" in modules else 0

    def kind_of(tensor: Tensor) -> str:
        if running:
            return f"activations: {running[-1]}"
        kinds = {rows: "similarity", objective.model.classes: "logits"}
        return f"activations: {kinds.get(tensor.shape[-1], 'losses') if tensor.dim() == 2 else 'losses'}"

    try:
        with live.label_saved_tensors(kind_of):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def choose_prior(params: Params, classes: int | None, images: int | None) -> Prior:
    """The prior of the existing split, else of the given numbers of classes and images, else of the published data set.

    If the class counts are unknown, all classes except the largest are equal; memory depends on no other count. Raises
    ParamsError if the number of classes is unknown, or if `images` is given although the split has counts.
    """
    published = PUBLISHED.get(params.data.source)
    if classes is None and PRIOR.is_file():
        if images is not None:
            raise ParamsError(f"--images is {images}, but {PRIOR} has the number of images already; give --classes too")
        return load_prior()
    if classes is None and published is None:
        raise ParamsError(f"{PRIOR}: no such file, so --classes is needed; or run `dvc repro prior` first")
    classes = classes or published.classes
    published = published if published and published.classes == classes else None
    images = images or (published.images["train"] if published else 100 * classes)
    if images < classes:
        raise ParamsError(f"--images is {images}, below the {classes} classes; expected at least one image per class")
    largest = published.largest if published else min(images - classes + 1, 10 * images // classes)
    size, remainder = divmod(images - largest, classes - 1)
    counts = [largest, *(size + (index < remainder) for index in range(classes - 1))]
    uniform = [1 / classes] * classes
    return Prior([str(number) for number in range(classes)], counts, uniform, uniform, ["many"] * classes)


def memory_table(estimate: MemoryEstimate, title: str) -> Table:
    """Table of memory by kind, largest first."""
    table = Table("", "at the peak", "largest of its kind", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, most in sorted(estimate.largest.items(), key=lambda item: -item[1]):
        table.add_row(kind, format_bytes(estimate.at_peak.get(kind, 0)), format_bytes(most))
    table.add_section()
    table.add_row("total", format_bytes(estimate.peak), "")
    return table


def format_bytes(count: int) -> str:
    """Format bytes as GiB or MiB."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"


def memory_advice(estimate: MemoryEstimate, stage: str, card: float) -> list[str]:
    """Lines: whether the step fits a GPU with `card` GB, the memory of the images, and how to reduce memory."""
    images = f"all training images as bytes take {format_bytes(estimate.images)} in addition, unless they are streamed"
    if estimate.originals:
        images = f"originals for resized crops take at most {format_bytes(estimate.images)} of the host's memory (stream.mode)"
    if estimate.fits(card * 1e9):
        return [f"fits a card of {card:g} GB with a tenth of it left free; {images}"]
    return [
        f"does not fit a card of {card:g} GB with a tenth of it left free; {images}",
        f"to reduce memory: {stage}.accumulate, engine.checkpoint_activations, engine.precision: bfloat16, or more "
        "GPUs that share the batch",
    ]
