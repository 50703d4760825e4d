"""Exceptions of the pipeline that a user can act on.

A message is one line with the file, key or argument and what is allowed; several problems of one data set have one line
each.
"""

from __future__ import annotations

from pathlib import Path

from serving.shared.errors import TailorError as TailorError
from serving.shared.errors import install_command as install_command


class StageError(TailorError):
    """A stage or a command of the pipeline failed. Exit code 1."""


class ParamsError(StageError):
    """params.yaml or an argument is not valid. Exit code 2."""

    exit_code = 2


class DataError(StageError):
    """The data are not valid: a file, a label or a count. Exit code 1."""


class DataProblems(DataError):
    """Several problems of the data: one line with their number, then one line each.

    problems: pairs of path and text. Of problems with equal text the first `SHOWN` are listed and the others counted.
    """

    SHOWN = 10

    def __init__(self, root: Path, problems: list[tuple[Path, str]]) -> None:
        self.problems = problems
        lines = [f"{root}: has {len(problems):,} problems:"]
        for text in dict.fromkeys(text for _, text in problems):
            paths = [path for path, other in problems if other == text]
            lines += ["  " + " ".join(f"{path}: {text}".split()) for path in paths[: self.SHOWN]]
            if len(paths) > self.SHOWN:
                lines.append(f"  ... and {len(paths) - self.SHOWN:,} more: {text}")
        super().__init__("\n".join(lines))


def raise_problems(root: Path, problems: list[tuple[Path, str]]) -> None:
    """Raise DataError for one problem, DataProblems for several, nothing for none."""
    if len(problems) > 1:
        raise DataProblems(root, problems)
    for path, text in problems:
        raise DataError(f"{path}: {text}")


def explain(error: Exception) -> str:
    """Format an error as one line, DataProblems as one line per problem, OSError with its file and cause."""
    if isinstance(error, DataProblems):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = error.filename if error.filename else "a file of the stage"
        return f"{where}: {error.strerror}"
    return " ".join(str(error).split())
