"""`tailor --version`: print the versions of Tailor and of the Triton server."""

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
        # This package contains the server, whose own version is available only from a running server.
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
