"""The Typer application `tailor`: the commands of serving with examples, and the exit status of errors.

The pipeline adds its own commands to the same application in `pipeline.commands.app`, which is what `tailor` runs.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
from PIL import Image
from typer.core import TyperGroup

from serving.commands.demo import demo
from serving.commands.drift import drift
from serving.commands.gateway import gateway
from serving.commands.keys import app as keys
from serving.commands.loadtest import loadtest
from serving.commands.playground import playground
from serving.commands.predict import predict, segment, status
from serving.commands.repository import repository
from serving.commands.serve import serve
from serving.commands.versions import promote, rollback, versions
from serving.shared.errors import TailorError, install_command
from serving.shared.ports import bypass_proxy_on_loopback
from serving.shared.terminal import print
from serving.shared.version import TAILOR_VERSION, source_commit

# Base class of typer's usage errors (unknown option, missing argument, bad value), the same in all releases of typer.
USAGE_ERROR = typer.BadParameter.__mro__[1]
# Headings of --help in their order, from preparing data to operating a server.
PREPARE, TRAIN, SERVE, REQUEST, OPERATE = HEADINGS = ("Prepare", "Train", "Serve", "Send requests", "Operate")


class Commands(TyperGroup):
    """Command group whose --help lists the commands under headings; Typer itself does so only with rich markup."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Print one line per command, under the headings."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        width = formatter.width - 4 - max(len(name) for name, _ in commands)
        for heading in HEADINGS:
            lines = [
                (name, each.get_short_help_str(width)) for name, each in commands if each.rich_help_panel == heading
            ]
            if lines:
                with formatter.section(heading):
                    formatter.write_dl(lines)


app = typer.Typer(
    name="tailor",
    cls=Commands,
    help="Long-tailed image classification: from images to a served model that takes a class prior with each request.",
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if not requested:
        return
    print(f"tailor {TAILOR_VERSION} (commit {source_commit()})")
    try:
        # This package contains the server, whose own version is available only from a running server.
        print(f"tritonserver of nvidia-pytriton {metadata.version('nvidia-pytriton')}")
    except metadata.PackageNotFoundError:
        print(f"no tritonserver is installed; to install one, {install_command('serve')}")
    raise typer.Exit


def version(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Show the versions of Tailor and of Triton."
        ),
    ] = False,
) -> None:
    """Options of `tailor` before a command."""


app.callback(help=app.info.help)(version)


def add(function: Any, heading: str, example: str) -> None:
    """Register a function as a command under a heading of --help, with an example at the end of its --help."""
    app.command(epilog=example, rich_help_panel=heading)(function)


add(serve, SERVE, "Example: tailor serve --repository artifacts/repository --http-port 9000")
add(repository, SERVE, "Example: tailor repository --device gpu --tensorrt fp16 --output artifacts/repository")
add(gateway, SERVE, "Example: tailor gateway --http-port 8443 --grpc-port 8444 --certificate tls.crt --key tls.key")
add(promote, SERVE, "Example: tailor promote artifacts/export --keep 5")
add(rollback, SERVE, "Example: tailor rollback, or: tailor rollback 3")
add(versions, SERVE, "Example: tailor versions --json")
app.add_typer(keys, name="keys", rich_help_panel=SERVE)
add(predict, REQUEST, "Example: tailor predict cat.jpg dog.png --prior balanced --top 3 --json")
add(segment, REQUEST, "Example: tailor segment street.jpg --prior train --out map.png")
add(status, REQUEST, "Example: tailor status --url grpc://127.0.0.1:8001 --json")
add(playground, REQUEST, "Example: tailor playground --port 7860")
add(demo, REQUEST, "Example: tailor demo --samples artifacts/evaluation/samples")
add(loadtest, REQUEST, "Example: tailor loadtest --images photos --users 32 --time 2m --max-p99 200")
add(drift, OPERATE, "Example: tailor drift artifacts/logits --since 24h --write --retrain-above 0.1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 success, 1 failure, 2 misuse, 130 interrupted.

    An error that a user can act on is printed as one line on stderr; --debug adds the traceback. Any other exception is
    a bug in Tailor and is raised.
    """
    bypass_proxy_on_loopback()
    # Pillow warns about unusual images; Tailor accepts such an image or rejects it with its own error.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        result = app(words, prog_name="tailor", standalone_mode=False)
    except BrokenPipeError:
        # The reader of stdout has exited; the interpreter's flush at exit would print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        print("tailor: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message, status = _message_and_status(error, words[0])
        if "--debug" in words:
            print(traceback.format_exc(), end="", file=sys.stderr)
        print(f"tailor: {message}", file=sys.stderr)
        return status
    return result if isinstance(result, int) else 0


def _message_and_status(error: Exception, command: str) -> tuple[str, int]:
    """Return the message and exit status of an error that a user can act on. Raises any other error."""
    if isinstance(error, USAGE_ERROR):
        # Typer raises a bad value from pydantic's error, whose message does not name the value.
        value = next((f", not {each['input']!r:.100}" for each in getattr(error.__cause__, "errors", list)()), "")
        return f"{error.format_message()}{value}", error.exit_code
    if isinstance(error, TailorError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 1
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in ("", "models", "pipeline", "serving"):
        raise error
    remedy = install_command("pipeline")
    return f"{command} needs the package {package}, which is not installed; {remedy}", 1
