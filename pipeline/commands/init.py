"""`tailor new`, `tailor init` and `tailor recipe`: create a project and write its params.yaml."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
Images = Annotated[
    Path,
    typer.Argument(
        metavar="FOLDER", help="A folder with a folder of images for each class, or with images/ and annotations/."
    ),
]
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
    from pipeline.preparation.project import DEFAULT_PARAMS, create_project

    steps = create_project(folder, apply_recipe(recipe, DEFAULT_PARAMS)[0] if recipe else None)
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
    estimates the time on this machine and the accuracy from them. It trains nothing, and you can change every value. A
    folder with images/ and annotations/ gets task segmentation; its classes.txt has the names of the classes.
    Outside a project it first makes the working folder a project, as `tailor new` does.
    """
    from pipeline.params.recipe import load_document
    from pipeline.preparation.first_params import without_text, write_text
    from pipeline.preparation.project import create_project, default_params, keep_out_of_git
    from pipeline.shared.errors import ParamsError

    template = _template(output, overwrite=force or dry_run)
    if Path().resolve().is_relative_to(folder.resolve()):
        raise ParamsError(
            f"{folder}: is the project's folder or contains it; expected a folder of images inside the project or "
            "elsewhere, such as data/source: move the class folders there, or run `tailor new DIR` elsewhere"
        )
    if encoder and no_encoder:
        raise ParamsError("--encoder and --no-encoder: expected one of the two")
    chosen, estimate, lines, warnings = _proposal(folder, encoder, no_encoder, text_source)
    if "task" not in chosen and load_document(template).get("task") == "segmentation":
        template = default_params()
        warnings.append(f"{output}: was of task segmentation; its other values are now those of the default recipe")
    chosen |= {} if "text" in chosen else without_text(template)
    text, _ = write_text(template, chosen)
    steps = create_project(Path()) if not (dry_run or output.is_file()) else []
    if not dry_run:
        write_file(output, text)
        keep_out_of_git(folder)
    if as_json:
        listed = {key: {"value": value, "why": why} for key, (value, why) in chosen.items()}
        print_json(listed | {"estimate": estimate})
    elif dry_run:
        print(text, end="")
    else:
        print(f"{folder}: {lines[0]}")
        for key, (value, why) in chosen.items():
            print(f"  {key} = {value}  # {why}")
        for line in lines[1:]:
            print(line)
        print(f"→ {output}; next: {''.join(f'{step}, ' for step in steps)}tailor data check, then: dvc repro")
    for line in warnings:
        print(f"init: {line}", file=sys.stderr)
    return 0


def _proposal(
    folder: Path, encoder: str | None, no_encoder: bool, text_source: Path | None
) -> tuple[dict[str, tuple[Any, str]], dict[str, Any] | None, list[str], list[str]]:
    """Return the suggested values with their reasons, the estimate, lines on the folder and the choice, and warnings."""
    from pipeline.model_io.devices import choose_device
    from pipeline.preparation.encoder_choice import choose_encoder
    from pipeline.preparation.first_params import FROM_SCRATCH, suggest_params, text_values
    from pipeline.preparation.folder_summary import inspect_folder
    from pipeline.segmentation.first_params import holds_label_maps, inspect_label_maps, suggest_label_map_params
    from pipeline.shared.errors import ParamsError

    device = choose_device("auto")
    if holds_label_maps(folder):
        if encoder or text_source:
            raise ParamsError(
                f"--encoder and --text: {folder} holds label maps, whose networks have no encoder; omit them"
            )
        maps = inspect_label_maps(folder)
        chosen = suggest_label_map_params(maps, folder.as_posix(), device.type == "cuda")
        return chosen, None, [str(maps)], maps.remarks()
    summary = inspect_folder(folder)
    choice = FROM_SCRATCH if no_encoder else choose_encoder(summary, encoder, device)
    chosen = suggest_params(summary, folder.as_posix(), device.type == "cuda", choice)
    more, warning = text_values(summary.classes, text_source, choice.encoder is not None) if text_source else ({}, "")
    lines = [str(summary), f"encoder {choice.encoder.name if choice.encoder else 'none'}: {choice.reason}"]
    return chosen | more, choice.estimate(), lines, _warnings(folder, summary, choice, warning)


def _template(output: Path, overwrite: bool) -> str:
    """Return the text of the params file to change; outside a project, the default text.

    overwrite: whether to overwrite uncommitted changes. Raises ParamsError if the file must not be written.
    """
    from pipeline.params import read_yaml
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
    read_yaml(output)  # raises the usual error if the file is not a mapping
    template = output.read_text(encoding="utf-8")
    if not overwrite and template != default_params() and _changed(output):
        raise ParamsError(f"{output}: has uncommitted changes; commit it, or pass --force to overwrite it")
    return template


def _warnings(folder: Path, summary: FolderSummary, choice: EncoderChoice, warning: str) -> list[str]:
    """Return warnings: too few images, unreadable files, features that do not separate the classes."""
    from models.sample_size import ADVICE, warnings_of
    from pipeline.preparation.folder_summary import expected_tests

    lines = list(summary.remarks)
    if choice.sample and not choice.sample.above_chance:
        chance = f"not above chance, which is {100 / choice.sample.classes:.0f} %"
        lines.append(f"warning: {choice.sample}; {chance}: add images, or pass --no-encoder")
    if warning:
        lines.append(f"warning: {warning}")
    few = warnings_of(expected_tests(summary))
    lines += [f"warning: {line}" for line in [*few, *([f"too few test images: {ADVICE}"] if few else [])]]
    return lines + [
        f"{folder / reference}: cannot be read; `tailor data check` prints why" for reference in summary.unreadable[:5]
    ]


def _changed(path: Path) -> bool:
    """Whether an overwrite would lose changes: the file differs from the last commit, or git does not track it.

    Raises GitError if git refuses to read the repository.
    """
    from pipeline.shared.lineage import git

    changes = git(path.resolve().parent, "status", "--porcelain", "--", path.name)
    return changes is None or bool(changes)
