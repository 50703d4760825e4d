"""`tailor playground`: serve the playground page for a running server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from serving.client.sync_client import Client
from serving.commands.options import CaFile, Debug, Headers, Timeout, Url, parse_headers, server_url
from serving.shared.errors import InputError, install_command
from serving.shared.names import SEGMENTER
from serving.shared.ports import check_proxies, choose_ports
from serving.shared.terminal import print

Port = Annotated[int, typer.Option(min=0, max=65535, help="Port of the page on 127.0.0.1; 0 takes any free one.")]

Samples = Annotated[
    Path,
    typer.Option(help="Folder of images to click; by default those that evaluation keeps. None where it is missing."),
]


def playground(
    url: Url = None,
    port: Port = 7860,
    samples: Samples = Path("artifacts/evaluation/samples"),
    timeout: Timeout = 60.0,
    header: Headers = None,
    ca_file: CaFile = None,
    debug: Debug = False,
) -> None:
    """Open a page that compares priors on your own images.

    It shows the classes of an image, or its class map with a server of task segmentation. Needs a running server and
    Gradio (extra `playground`). The page is for this machine alone and sends images nowhere but to the server. Ends with
    Ctrl-C.
    """
    # Gradio reads them at import: no telemetry and no check for a newer version of Gradio.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    check_proxies()  # Gradio fails at import with a proxy that it cannot use
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(f"tailor playground needs Gradio; {install_command('playground')}") from None
    from serving.playground.page import build, find_samples, launch_options

    with Client(server_url(url, None), timeout, headers=parse_headers(header), ca_file=ca_file) as client:
        client.class_names()  # an unreachable server fails here with one line
        segments = any(model.name == SEGMENTER for model in client.status().models)
        page = build(client, find_samples(samples.absolute()), segments)
        chosen = choose_ports("127.0.0.1", {"--port": port})["--port"]
        _, local, _ = page.launch(
            server_port=chosen, prevent_thread_lock=True, allowed_paths=[str(samples.absolute())], **launch_options()
        )
        print(f"playground {local}", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)
