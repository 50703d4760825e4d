"""`tailor memory` and `tailor ray-train`: estimate the GPU memory of a training step, and run a stage on Ray."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import ParamsOption
from pipeline.shared.artifacts import PARAMS_FILE
from pipeline.shared.errors import ParamsError
from serving.commands.options import Debug
from serving.shared.terminal import Console, print


class Stage(StrEnum):
    """A training stage."""

    teacher = "teacher"
    student = "student"


def memory(
    params: ParamsOption = PARAMS_FILE,
    stage: Annotated[Stage, typer.Option(help="The training stage.")] = Stage.student,
    classes: Annotated[
        int | None, typer.Option(min=2, help="Number of classes; those of artifacts/prior.json if not given.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(help="With --classes: training images; as published, or 100 a class, if not given."),
    ] = None,
    card: Annotated[float, typer.Option(help="Memory of the GPU in GB.")] = 80.0,
    debug: Debug = False,
) -> int:
    """Print the GPU memory of a training step, by component.

    Needs no GPU and no images. Exit status 1 if the step does not fit.
    """
    from pipeline.features.stored import takes_features
    from pipeline.params import load_params
    from pipeline.preparation.gpu_memory import choose_prior, estimate_memory, memory_advice, memory_table

    if card <= 0:
        raise ParamsError(f"--card is {card:g}; expected more than 0")
    recipe = load_params(params)
    section = getattr(recipe, stage.value)
    network = section.backbone
    if recipe.encoder:
        if takes_features(recipe, stage.value):
            raise ParamsError(
                f"encoder is {recipe.encoder.name}: {stage} trains on stored features, not on images, and needs no estimate"
            )
        network = f"{recipe.encoder.name}, tune {recipe.student.tune}"
    needed = estimate_memory(recipe, stage.value, choose_prior(recipe, classes, images))
    console = Console(width=100)
    console.print(memory_table(needed, f"{stage}: {network}, batch {section.batch_size}, {recipe.image.size} pixels"))
    for line in memory_advice(needed, stage.value, card):
        console.print(line, highlight=False)
    return 0 if needed.fits(card * 1e9) else 1


def ray_train(
    stage: Annotated[Stage | None, typer.Argument(help="The training stage.", show_default=False)] = None,
    module: Annotated[
        str | None, typer.Option("-m", metavar="pipeline.STAGE", help="The stage, in the form of dvc.yaml.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share a batch.")] = 1,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="A running cluster; a new one on this machine if not given."),
    ] = None,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs of a worker.")] = 1,
    restarts: Annotated[int, typer.Option(min=0, help="How often lost workers are restarted.")] = 0,
    params: ParamsOption = PARAMS_FILE,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and Ray's log.")] = False,
) -> None:
    """Run a training stage on the workers of a Ray cluster.

    Without --address it starts a small cluster on this machine. The stage is the same that `torchrun` starts.
    """
    from pipeline.command_line import end_with_dvc
    from pipeline.deploy.ray_train import Job, run
    from pipeline.params import load_params

    name = stage.value if stage else re.sub(r"^pipeline\.", "", module or "")
    if name not in list(Stage):
        raise ParamsError(f"stage is {name!r}; expected one of {', '.join(Stage)}")
    end_with_dvc(name)
    load_params(params)  # an error in the file is reported before a cluster is started
    print(f"{name}: {run(Job(name, Path.cwd(), params, workers, address, cpus, restarts, debug))}")
