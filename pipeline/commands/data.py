"""`tailor data check` and `tailor data pack`: what `python -m pipeline.data` does, under the one program."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

PROGRAM = "tailor data"
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Check a data set, or pack it into a few shards.",
    epilog="Example: tailor data check, then: tailor data pack data/packed",
)


class ToldByParser(TyperCommand):
    """A command whose help, where it is asked for without a run, is what `--help` prints: that of the parser."""

    def get_help(self, ctx: Any) -> str:
        """The help in the width of the context."""
        from pipeline.data import help_of

        return help_of(str(self.name), PROGRAM, ctx.terminal_width)


# The options, their help and their errors are those of pipeline.data.
PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(cls=ToldByParser, context_settings=PASSED_ON)
def check(context: typer.Context) -> int:
    """Say what is wrong with the data, and draw the long tail."""
    return _run("check", context.args)


@app.command(cls=ToldByParser, context_settings=PASSED_ON)
def pack(context: typer.Context) -> int:
    """Write many small files into a few Parquet shards."""
    return _run("pack", context.args)


def _run(name: str, arguments: list[str]) -> int:
    from pipeline.data import main

    try:
        return main([name, *arguments], PROGRAM)
    except SystemExit as end:  # argparse ends the program itself, after --help and after a misuse
        return int(end.code or 0)
