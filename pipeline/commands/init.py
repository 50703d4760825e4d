"""`tailor new`, `tailor init` and `tailor recipe`: create a project and write its params.yaml."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.shared.artifacts import PARAMS_FILE, write_file
from serving.commands.options import AsJson, Debug, print_json
from serving.shared.terminal import print

if TYPE_CHECKING:
    from pipeline.preparation.encoder_choice import EncoderChoice
    from pipeline.preparation.folder_summary import FolderSummary

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder to create; it may exist without a params.yaml.")
]
Recipes = Annotated[
    list[Path] | None,
    typer.Option(
        "--recipe", help="A recipe to apply, e.g. recipes/cifar100-if100-200.yaml; may be repeated.", show_default=False
    ),
]
Images = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of images for each class, in one folder.")]
Output = Annotated[Path, typer.Option(help="The file to write; its current content is the template.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a file with uncommitted changes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the file, write nothing.")]
EncoderName = Annotated[
    str | None,
    typer.Option("--encoder", help="Use this encoder of `tailor encoders`, not the proposed one.", metavar="NAME"),
]
TextSource = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="Text features of the class names as centres: an .onnx text encoder with tokenizer.json beside it, a folder of "
        "transformers, or a .safetensors file of features.",
        show_default=False,
    ),
]
FromScratch = Annotated[bool, typer.Option("--no-encoder", help="Train from scratch, without a pretrained encoder.")]


def new(folder: Folder, recipe: Recipes = None, debug: Debug = False) -> None:
    """Create a project of your own, with git and DVC.

    Its stages run from the installed package, so that several projects share one environment. The default recipe trains on
    scanned digits that come with Tailor; `tailor init` writes the recipe for your own images.
    """
    from pipeline.params.recipe import apply_recipe
    from pipeline.preparation.project import create_project

    steps = create_project(folder)
    if recipe:
        text, _ = apply_recipe(recipe, folder / PARAMS_FILE)
        write_file(folder / PARAMS_FILE, text)
    print(f"→ {folder}; next:")
    first = "dvc repro" if recipe else "tailor init data/source, once it holds a folder of images per class"
    for line in [f"cd {folder}", *steps, first, "git add . && git commit -m 'a project'"]:
        print(f"  {line}")


def recipe(
    overlays: Annotated[
        list[Path],
        typer.Argument(metavar="RECIPE", help="Files of recipes/; later ones take precedence.", show_default=False),
    ],
    params: Annotated[Path, typer.Option(help="The file to change.")] = PARAMS_FILE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the changes, write nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Write a recipe's values into params.yaml."""
    from pipeline.params.recipe import apply_recipe

    text, lines = apply_recipe(overlays, params)
    if not dry_run:
        write_file(params, text)
    print("\n".join(lines) or f"{params} has these values already")


def init(
    folder: Images,
    output: Output = PARAMS_FILE,
    encoder: EncoderName = None,
    no_encoder: FromScratch = False,
    text_source: TextSource = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Write a params.yaml for your own images.

    Counts the images of each class, reads their sizes, and chooses encoder or network, epochs, queues and held-out
    images; a comment beside each value gives the reason. It computes the features of a sample of images in seconds, and
    estimates the time on this machine and the accuracy from them. It trains nothing, and you can change every value.
    Outside a project it first makes the working folder a project, as `tailor new` does.
    """
    from pipeline.model_io.devices import choose_device
    from pipeline.preparation.encoder_choice import choose_encoder
    from pipeline.preparation.first_params import FROM_SCRATCH, suggest_params, text_values, without_text, write_text
    from pipeline.preparation.folder_summary import inspect_folder
    from pipeline.preparation.project import create_project, keep_out_of_git
    from pipeline.shared.errors import ParamsError

    template = _template(output, overwrite=force or dry_run)
    if Path().resolve().is_relative_to(folder.resolve()):
        raise ParamsError(
            f"{folder}: is the project's folder or contains it; expected a folder of images inside the project or "
            "elsewhere, such as data/source: move the class folders there, or run `tailor new DIR` elsewhere"
        )
    if encoder and no_encoder:
        raise ParamsError("--encoder and --no-encoder: expected one of the two")
    summary, device = inspect_folder(folder), choose_device("auto")
    choice = FROM_SCRATCH if no_encoder else choose_encoder(summary, encoder, device)
    chosen = suggest_params(summary, folder.as_posix(), device.type == "cuda", choice)
    more, warning = text_values(summary.classes, text_source, choice.encoder is not None) if text_source else ({}, "")
    chosen |= more
    chosen |= {} if "text" in chosen else without_text(template)
    text, _ = write_text(template, chosen)
    steps = create_project(Path()) if not (dry_run or output.is_file()) else []
    if not dry_run:
        write_file(output, text)
        keep_out_of_git(folder)
    if as_json:
        listed = {key: {"value": value, "why": why} for key, (value, why) in chosen.items()}
        print_json(listed | {"estimate": choice.estimate()})
    elif dry_run:
        print(text, end="")
    else:
        print(f"{folder}: {summary}")
        for key, (value, why) in chosen.items():
            print(f"  {key} = {value}  # {why}")
        print(f"encoder {choice.encoder.name if choice.encoder else 'none'}: {choice.reason}")
        print(f"→ {output}; next: {''.join(f'{step}, ' for step in steps)}tailor data check, then: dvc repro")
    _print_warnings(folder, summary, choice, warning)
    return 0


def _template(output: Path, overwrite: bool) -> str:
    """Return the text of the params file to change; outside a project, the default text.

    overwrite: whether to overwrite uncommitted changes. Raises ParamsError if the file must not be written.
    """
    from pipeline.preparation.project import default_params, enclosing_project
    from pipeline.shared.errors import ParamsError

    if not output.is_file():
        if output != PARAMS_FILE:
            raise ParamsError(f"{output}: no such file; expected a params.yaml to change")
        if project := enclosing_project(Path()):
            raise ParamsError(
                f"params.yaml: no such file here; this folder is in the project {project}; run the command there"
            )
        return default_params()
    template = output.read_text(encoding="utf-8")
    if not overwrite and template != default_params() and _changed(output):
        raise ParamsError(f"{output}: has uncommitted changes; commit it, or pass --force to overwrite it")
    return template


def _print_warnings(folder: Path, summary: FolderSummary, choice: EncoderChoice, warning: str) -> None:
    """Print warnings to stderr: too few images, unreadable files, features that do not separate the classes."""
    from models.sample_size import ADVICE, warnings_of
    from pipeline.preparation.folder_summary import expected_tests

    for line in summary.remarks:
        print(f"init: {line}", file=sys.stderr)
    if choice.sample and not choice.sample.above_chance:
        chance = f"not above chance, which is {100 / choice.sample.classes:.0f} %"
        print(f"init: warning: {choice.sample}; {chance}: add images, or pass --no-encoder", file=sys.stderr)
    if warning:
        print(f"init: warning: {warning}", file=sys.stderr)
    few = warnings_of(expected_tests(summary))
    for line in [*few, *([f"too few test images: {ADVICE}"] if few else [])]:
        print(f"init: warning: {line}", file=sys.stderr)
    for reference in summary.unreadable[:5]:
        print(f"init: {folder / reference}: cannot be read; `tailor data check` prints why", file=sys.stderr)


def _changed(path: Path) -> bool:
    """Whether an overwrite would lose changes: the file differs from the last commit, or git does not track it.

    Raises GitError if git refuses to read the repository.
    """
    from pipeline.shared.lineage import git

    changes = git(path.resolve().parent, "status", "--porcelain", "--", path.name)
    return changes is None or bool(changes)
