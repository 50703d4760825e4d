"""Print untrusted text (class names, file names, server responses) safely on a terminal, or write it as CSV.

Control characters are escaped. Every module prints through `print` and `Console` of this module; ruff rejects the
builtin and rich's class.
"""

from __future__ import annotations

import builtins
import re
import sys
from os import PathLike
from typing import IO, Any

from rich import console as rich_console
from rich.markup import escape
from rich.text import Text

# C0 except tab and line feed, DEL, C1, line separators, bidi embeddings, overrides and isolates, and surrogates (bytes
# of a file name that is not UTF-8).
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
FORMULA = re.compile("[=+\\-@\t\r＝＋－＠]")  # a spreadsheet reads text that begins so as a formula
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def safe_text(text: object) -> str:
    """Escape each control character as in `\\u001b`. JSON has the same escapes, so JSON text keeps its meaning."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


def cell(text: object) -> str:
    """Text for one cell of a rich table: on one line, with brackets escaped."""
    return escape(safe_text(text).replace("\n", "\\n").replace("\t", "\\t"))


SINGULAR = {"are": "is", "were": "was", "have": "has"}  # other verbs get an s


def csv_cell(value: Any) -> Any:
    """A value for a CSV file for spreadsheets: text that would be read as a formula gets a leading apostrophe."""
    if not isinstance(value, str | PathLike | Exception):
        return value
    text = str(value)
    return safe_text(f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text)


def plain_cell(text: str) -> str:
    """Read the text of a cell that `csv_cell` wrote: without its apostrophe."""
    return text[1:] if text.startswith("'") and FORMULA.match(text, 1) else text


def counted(number: int | float, noun: str, verb: str = "") -> str:
    """A number with its noun and an optional verb in the right form: `1 class is`, `2 classes are`."""
    if number == 1:
        return f"1 {noun} {SINGULAR.get(verb, f'{verb}s')}" if verb else f"1 {noun}"
    plural = f"{noun}es" if noun.endswith(("s", "x", "tch")) else f"{noun}s"
    return f"{number:,} {plural} {verb}".rstrip()


def print(*values: object, file: IO[str] | None = None, end: str = "\n", flush: bool = False) -> None:
    """The builtin `print` with `safe_text` for each value."""
    builtins.print(*map(safe_text, values), file=file or sys.stdout, end=end, flush=flush)


class Console(rich_console.Console):  # noqa: TID251
    """Rich's console with `safe_text` for every text, and without emoji codes such as `:cat:`, which may be a class."""

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Rich's method with `safe_text`."""
        return super().render_str(safe_text(text), **options)
