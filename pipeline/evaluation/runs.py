"""Find a run's predictions.parquet and prior.json, in a folder or at a git revision."""

from __future__ import annotations

from pathlib import Path

from pipeline.evaluation.predictions import Contender
from pipeline.shared.artifacts import EVALUATION, PRIOR, write_file
from pipeline.shared.errors import ParamsError, StageError
from pipeline.shared.lineage import git

PREDICTIONS = "predictions.parquet"


def load_run(folder: Path) -> Contender:
    """Find the two files of a run in a folder.

    folder: a project, its artifacts/, its artifacts/evaluation/, or a folder with a copy of both files. Raises
    ParamsError with the missing file or folder.
    """
    layouts = [(folder, folder), (folder, folder.parent), (folder / EVALUATION.name, folder)]
    layouts.append((folder / EVALUATION, folder / PRIOR.parent))
    for evaluation, artifacts in layouts:
        if (evaluation / PREDICTIONS).is_file() and (artifacts / PRIOR.name).is_file():
            return Contender(evaluation / PREDICTIONS, artifacts / PRIOR.name)
    if not folder.is_dir():
        raise ParamsError(f"{folder}: no such folder; expected a run with {PREDICTIONS} and {PRIOR.name}")
    for evaluation, _ in layouts:
        if (evaluation / PREDICTIONS).is_file():
            raise ParamsError(
                f"{evaluation / PREDICTIONS}: has no {PRIOR.name} beside or above it; copy the run's {PRIOR} there"
            )
    raise ParamsError(
        f"{folder}: has no {PREDICTIONS}; expected the folder of a run that `dvc repro evaluate` finished"
    )


def load_run_at_revision(revision: str, folder: Path) -> Contender:
    """Copy a revision's predictions.parquet and prior.json into `folder`, from DVC's cache or the default remote.

    revision: a commit, branch, tag or experiment that git or DVC resolves in the repository of the working folder.
    Raises ParamsError if the revision cannot be resolved, StageError if its files are not available or git refuses to
    read the repository.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import RevError, SCMError

    run = Contender(folder / PREDICTIONS, folder / PRIOR.name)
    try:
        # Paths are relative to the repository root; the working folder may be a subfolder with a separate DVC project.
        project = Path(git(Path(), "rev-parse", "--show-prefix") or "")
        files = DVCFileSystem(".", rev=revision, subrepos=True)
        for source, target in ((EVALUATION / PREDICTIONS, run.predictions), (PRIOR, run.prior)):
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
    return run
