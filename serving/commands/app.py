"""Every command of `tailor` with an example of it, and how an error ends the program."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import typer
from PIL import Image

from serving.commands.added import Commands
from serving.commands.drift import drift
from serving.commands.gateway import gateway
from serving.commands.loadtest import loadtest
from serving.commands.playground import playground
from serving.commands.predict import predict, status
from serving.commands.repository import repository
from serving.commands.serve import serve
from serving.commands.version import version
from serving.commands.versions import promote, rollback, versions
from serving.ports import bypass_proxy_on_loopback
from serving.terminal import print

# typer's usage errors (unknown option, missing argument, bad value) under the one base that all its releases have.
USAGE_ERROR = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="tailor",
    cls=Commands,
    help="Long-tailed image classification, from images to a served model that is asked for a class prior per request.",
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.callback(help=app.info.help)(version)
# In the order of --help.
app.command(epilog="Example: tailor serve --repository artifacts/repository --http-port 9000")(serve)
app.command(epilog="Example: tailor repository --device gpu --tensorrt fp16 --output artifacts/repository")(repository)
app.command(epilog="Example: tailor promote artifacts/export --keep 5")(promote)
app.command(epilog="Example: tailor rollback, or: tailor rollback 3")(rollback)
app.command(epilog="Example: tailor versions --json")(versions)
app.command(epilog="Example: tailor gateway --http-port 8443 --grpc-port 8444 --certificate tls.crt --key tls.key")(
    gateway
)
app.command(epilog="Example: tailor predict cat.jpg dog.png --prior balanced --top 3 --json")(predict)
app.command(epilog="Example: tailor status --url grpc://127.0.0.1:8001 --json")(status)
app.command(epilog="Example: tailor drift artifacts/logits --since 24h --write --retrain-above 0.1")(drift)
app.command(epilog="Example: tailor playground --port 7860")(playground)
app.command(epilog="Example: tailor loadtest --images photos --users 32 --time 2m --max-p99 200")(loadtest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 well, 1 failure, 2 misuse, 130 interrupted.

    An error is one line on stderr; its traceback is shown with --debug alone. What a user can act on carries its exit
    status: errors of this room, usage errors, and those of the rooms that add commands.
    """
    bypass_proxy_on_loopback()
    # Pillow warns of an image that is refused, in one line, a moment later.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        result = app(given, prog_name="tailor", standalone_mode=False)
    except BrokenPipeError:
        # Whoever read the output has gone; the interpreter's own flush at exit would complain of it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if "--debug" in given:
            print(traceback.format_exc(), end="", file=sys.stderr)
        where = f"{error.filename}: " if error.filename else ""
        print(f"tailor: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        print("tailor: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(status := getattr(error, "exit_code", None), int):
            raise
        if "--debug" in given:
            print(traceback.format_exc(), end="", file=sys.stderr)
        message = error.format_message() if isinstance(error, USAGE_ERROR) else str(error)
        print(f"tailor: {message}", file=sys.stderr)
        return status
    return result if isinstance(result, int) else 0
