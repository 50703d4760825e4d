"""`tailor new`: a project of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.commands.options import Debug
from serving.terminal import print

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make; it may exist, without a params.yaml.")]
Recipes = Annotated[
    list[Path] | None,
    typer.Option(
        "--recipe", help="A recipe to apply, e.g. recipes/cifar100-if100-200.yaml; may be repeated.", show_default=False
    ),
]


@app.command(epilog="Example: tailor new trees, then put a folder of images per class into trees/data/source")
def new(folder: Folder, recipe: Recipes = None, debug: Debug = False) -> int:  # noqa: ARG001
    """Create a project of your own, with git and DVC.

    Its stages run from the installed package, so that several projects share one environment. The default recipe trains on
    scanned digits that come with Tailor; `tailor init` writes the recipe for your own images.
    """
    from pipeline.artifacts import write_file
    from pipeline.project import create_project
    from pipeline.recipe import apply_recipe

    steps = create_project(folder)
    if recipe:
        text, _ = apply_recipe(recipe, folder / "params.yaml")
        write_file(folder / "params.yaml", text)
    print(f"→ {folder}; next:")
    first = "dvc repro" if recipe else "tailor init data/source, once it holds a folder of images per class"
    for line in [f"cd {folder}", *steps, first, "git add . && git commit -m 'a project'"]:
        print(f"  {line}")
    return 0
