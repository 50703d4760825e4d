"""Commands of `tailor` that other rooms add, by entry points: serving knows their names and imports none of them."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from serving.errors import ServingError

GROUP = "tailor.commands"
# The map that --help draws, in the order of a user's way; a command that is not here comes last.
MAP = {
    "Prepare": ("new", "init", "data", "ingest"),
    "Serve": ("serve", "repository", "gateway", "promote", "rollback", "versions"),
    "Ask": ("predict", "status", "playground", "loadtest"),
    "Look after it": ("compare", "history", "drift", "retrain", "schedule", "doctor"),
}


class Commands(TyperGroup):
    """The commands of `tailor`, and after them those of the entry-point group, each loaded when it is named or listed.

    An entry point is a typer.Typer (of one command, or of several beneath its name) or a function that typer can call.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of --help."""
        own = super().list_commands(ctx)
        return own + sorted({entry.name for entry in entry_points(group=GROUP)} - set(own))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands with a line each, under the headings of the map."""
        found = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        placed = {name for names in MAP.values() for name in names}
        sections = {**MAP, "More": tuple(name for name in found if name not in placed)}
        width = formatter.width - 6 - max(map(len, found), default=0)
        for heading, names in sections.items():
            lines = [(name, found[name].get_short_help_str(width)) for name in names if found.get(name)]
            if lines:
                with formatter.section(heading):
                    formatter.write_dl(lines)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name; None if there is none."""
        own = super().get_command(ctx, cmd_name)
        return own or next(map(_load, entry_points(group=GROUP, name=cmd_name)), None)


def _load(entry: EntryPoint) -> Any:
    try:
        found = entry.load()
    except ModuleNotFoundError as error:
        found = _without(entry.name, error.name or entry.module)
    if not isinstance(found, typer.Typer):
        function, found = found, typer.Typer(add_completion=False, rich_markup_mode=None)
        found.command(entry.name)(function)
    command = typer.main.get_command(found)
    command.name = entry.name
    return command


def _without(name: str, module: str) -> typer.Typer:
    """What stands in for a command whose packages are not installed, so that --help and the other commands go on."""
    needs = f"needs the package {module.partition('.')[0]}, which is not installed"
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.command(
        name,
        help=f"({needs})",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def refuse() -> None:
        raise ServingError(f"{name} {needs}; install 'tailor[pipeline]'")

    return app
