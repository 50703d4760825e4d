"""Write the pages of the site into build/docs, or the folder given: docs/ and the pages generated from the source.

Generated are reference/commands.md (`tailor --help`) and reference/params.md (params.yaml). A page of docs/ links to files
of the repository by relative paths; on the site, which has no code, these links become text.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def write(target: Path) -> None:
    """Replace the folder `target` by the pages of the site."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "docs", target, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for page in target.rglob("*.md"):
        page.write_text(OUTSIDE.sub(r"\1", page.read_text(encoding="utf-8")), encoding="utf-8")
    (target / "reference/commands.md").write_text(commands(), encoding="utf-8")
    (target / "reference/params.md").write_text(params(), encoding="utf-8")


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


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build/docs")
