"""`tailor encoders`: list the pretrained encoders, and measure their speed on this machine."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.util import find_spec
from typing import Annotated

import typer
from rich.table import Table

from models.networks.encoders import ENCODERS, Encoder, UnknownEncoderError, find_encoder
from pipeline.shared.errors import ParamsError
from serving.commands.options import AsJson, Debug, print_json
from serving.shared.terminal import Console

BATCH, SECONDS = 16, 2.0  # images of a forward pass, and length of a measurement


def encoders(
    names: Annotated[list[str] | None, typer.Argument(help="Encoders to list; all if none is given.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure images per second on this machine.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the pretrained encoders.

    Prints input size, feature width, parameters, licence, source and sha256 of the weights. Teacher and student are
    trained on the features of the encoder that section encoder of params.yaml names. Any other network of timm can be
    used with the name timm/<model>.
    """
    listed = [_listed(name) for name in names or ENCODERS]
    speeds = {encoder.name: images_per_second(encoder) for encoder in listed} if measure else {}
    if as_json:
        print_json([{**asdict(each), "images_per_second": speeds.get(each.name)} for each in listed])
    else:
        Console().print(encoders_table(listed, speeds))


def _listed(name: str) -> Encoder:
    try:
        return find_encoder(name)
    except UnknownEncoderError as error:
        raise ParamsError(f"{name!r}: {error}") from None


def images_per_second(encoder: Encoder) -> float:
    """Measure forward passes at the encoder's image size. Random weights take as long as the pretrained ones."""
    import torch

    from models.networks.backbones import build_backbone
    from pipeline.model_io.devices import choose_device

    device = choose_device("auto")
    network = build_backbone(f"timm/{encoder.model}").eval().to(device, memory_format=torch.channels_last)
    images = torch.rand(BATCH, 3, encoder.size, encoder.size, device=device)
    with torch.inference_mode():
        network(images).cpu()  # the first pass allocates memory
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            network(images).cpu()
            done += BATCH
    return round(done / (time.perf_counter() - started), 1)


def encoders_table(listed: list[Encoder], speeds: dict[str, float]) -> Table:
    """Return the table that the command prints, at most 120 columns wide; in 80 columns its texts are folded, never cut."""
    table = Table(box=None, pad_edge=False, caption="sha256 -: give encoder.sha256. accept: value of encoder.licence.")
    numbers = ("pixels", "width", "parameters", *(["images/s"] if speeds else []))
    for column in ("name", *numbers):
        longest = max(map(len, (column, *ENCODERS))) if column == "name" else len(column)
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True, min_width=longest)
    for column in ("licence", "accept", "weights", "sha256"):
        table.add_column(column, overflow="fold")
    for each in listed:
        speed = [f"{speeds[each.name]:,.0f}"] if speeds else []
        table.add_row(
            each.name, str(each.size), f"{each.width:,}", f"{each.parameters / 1e6:.1f} M", *speed,
            each.licence, each.accept or "-", _where(each), f"{each.sha256[:12]}…" if each.sha256 else "-",
        )  # fmt: skip
    return table


def _where(encoder: Encoder) -> str:
    package = encoder.package
    return f"package, {'installed' if find_spec(package) else 'not installed'}" if package else "hub"
