"""`tailor predict` and `tailor status`: what asks a server."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serving.client import Client
from serving.commands.options import AsJson, Debug, ProtocolOption, Timeout, Url, address, print_json
from serving.display import as_mapping, prediction_table, status_table
from serving.errors import InputError, ServingError


def predict(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="JPEG, PNG or WebP files.", show_default=False)
    ],
    url: Url = None,
    protocol: ProtocolOption = None,
    prior: Annotated[
        str | None,
        typer.Option(
            metavar="balanced|train|NUMBER|FILE",
            help="Class prior of the answers: balanced, train, a strength (0 is balanced, 1 is train), or a file with "
            "the probabilities (JSON list, JSON object by class name, or a number per line). "
            "Server's default if not given.",
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="Classes to show; as many as the server gives if not given.")
    ] = None,
    timeout: Timeout = 60.0,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Classify image files and print the best classes of each."""
    with Client(address(url, protocol), timeout) as client:
        predictions = client.predict(images, prior)
    given = len(predictions[0].classes)
    if top is not None and top > given:
        raise InputError(f"--top is {top}; the server answers with the best {given}")
    if as_json:
        print_json([as_mapping(image, answer, top) for image, answer in zip(images, predictions, strict=True)])
    else:
        Console().print(prediction_table(images, predictions, top, prior))


def status(
    url: Url = None,
    protocol: ProtocolOption = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Show the server's state and the versions it serves. Status 1 when no server answers, or it answers no image."""
    with Client(address(url, protocol), timeout) as client:
        found = client.status()
    if as_json:
        print_json(asdict(found))
    else:
        Console().print(status_table(found))
    if found.problem:
        raise ServingError(found.problem)
