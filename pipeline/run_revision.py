"""A run as a git revision or a DVC experiment has it: its two files out of DVC's cache, whatever is checked out now."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifacts import EVALUATION, PRIOR, write_file
from pipeline.errors import ParamsError, StageError
from pipeline.gate import Contender
from pipeline.lineage import git
from pipeline.run_folder import PREDICTIONS


def contender_at(revision: str, folder: Path) -> Contender:
    """Copy a revision's predictions.parquet and prior.json into `folder`, from the cache or else the default remote.

    revision: whatever git or DVC resolves in the repository of the working folder: a commit, a branch, a tag, an
    experiment. Raises ParamsError for one that is not, StageError where its files are not to be had or git refuses to read it.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import RevError, SCMError

    found = Contender(folder / PREDICTIONS, folder / PRIOR.name)
    try:
        # Paths are those of the repository, of which the working folder may be a part, with a DVC project of its own.
        project = Path(git(Path(), "rev-parse", "--show-prefix") or "")
        files = DVCFileSystem(".", rev=revision, subrepos=True)
        for source, target in ((EVALUATION / PREDICTIONS, found.predictions), (PRIOR, found.prior)):
            write_file(target, files.read_bytes((project / source).as_posix()))
    except RevError:
        raise ParamsError(
            f"{revision!r} is no folder, no published version and no revision; expected one of them "
            "(`git log --oneline`, `dvc exp list` and `tailor versions` list them)"
        ) from None
    except SCMError:
        raise ParamsError(
            f"{revision!r} is no folder, and a revision needs a git repository; this folder is in none"
        ) from None
    except FileNotFoundError:
        raise StageError(
            f"{revision}: has no {source} in DVC's cache or remote; run `dvc fetch`, or `dvc repro` at that revision"
        ) from None
    except DvcException as error:
        raise StageError(f"{revision}: {source} cannot be read: {' '.join(str(error).split())}") from None
    return found
