"""`tailor --version`."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from serving.shared.terminal import print


def _tell(asked: bool) -> None:
    if not asked:
        return
    print(f"tailor {metadata.version('tailor')}")
    try:
        # This package brings the server, which cannot tell its own version without being started.
        print(f"tritonserver of nvidia-pytriton {metadata.version('nvidia-pytriton')}")
    except metadata.PackageNotFoundError:
        print("no tritonserver here; pip install 'tailor[serve]' brings one")
    raise typer.Exit


def version(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell, help="Show the version, and the server's.")
    ] = False,
) -> None:
    """What `tailor` takes before a command."""
