"""MkDocs hook: reference pages generated from `tailor --help` and params.yaml; links into the code become text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# A page links to files of the repository by relative paths; on the site, which has no code, these links become text.
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and remove Python files."""
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    files.append(File.generated(config, "reference/params.md", content=params()))
    for script in [file for file in files if file.src_uri.endswith(".py")]:
        files.remove(script)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files outside docs/ become plain text."""
    return OUTSIDE.sub(r"\1", markdown)


def commands() -> str:
    """The help of `tailor` and of each of its commands."""
    import typer

    from pipeline.commands.app import app

    program: Any = typer.main.get_command(app)
    lines = ["# Commands", "", "What `tailor COMMAND --help` prints. Exit status: 0 success, 1 failure, 2 misuse.", ""]
    context = program.make_context("tailor", [], resilient_parsing=True, max_content_width=100, terminal_width=100)
    lines += ["```text", program.get_help(context).strip(), "```", ""]
    for words, text in helps(program, context):
        lines += [f"## {words}", "", "```text", text.strip(), "```", ""]
    return "\n".join(lines)


def helps(group: Any, context: Any) -> Iterator[tuple[str, str]]:
    """Yield every command and group below a group: the words to type, and its --help."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        yield inner.command_path, command.get_help(inner)
        if hasattr(command, "list_commands"):
            yield from helps(command, inner)


def params() -> str:
    """Every section of params.yaml with its keys, types and defaults, and the default file."""
    from pydantic import BaseModel

    from pipeline.params import Params

    lines = [
        "# params.yaml",
        "",
        "An unknown key is refused; the message names the nearest valid key. The default file:",
        "",
    ]
    lines += ["```yaml", (ROOT / "params.yaml").read_text(encoding="utf-8").strip(), "```", ""]

    def section(model: type[BaseModel], name: str) -> None:
        lines.extend([f"## {name or 'Top level'}", "", *(model.__doc__ or "").strip().splitlines(), ""])
        lines.extend(["| key | type | default |", "|---|---|---|"])
        below: list[tuple[type[BaseModel], str]] = []
        for key, field in model.model_fields.items():
            kind: Any = field.annotation
            full = f"{name}.{key}".lstrip(".")
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                below.append((kind, full))
                lines.append(f"| `{key}` | section `{full}` | |")
                continue
            shown = (kind.__name__ if isinstance(kind, type) else str(kind)).replace("typing.", "").replace("|", "\\|")
            default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
            bounds = ", ".join(str(entry) for entry in field.metadata)
            lines.append(f"| `{key}` | `{shown}` {bounds} | {default} |")
        lines.append("")
        for inner, full in below:
            section(inner, full)

    section(Params, "")
    return "\n".join(line.rstrip() for line in lines)
