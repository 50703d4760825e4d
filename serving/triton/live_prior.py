"""Read the live prior of a model repository (live_prior.json), which `tailor drift --write` estimates, for requests.

The file is beside the model folders, so that writing it does not reload a model, and all versions with the same classes
share it. It is replaced by a rename, so a read gets the old or the new content.
"""

from __future__ import annotations

import json
from pathlib import Path

NAME = "live_prior.json"
FORMAT = 1
MAX_BYTES = 16 * 1024 * 1024
HINT = "run `tailor drift --write`"


class NoLivePrior(Exception):
    """There is no usable live prior; the message has the reason and the command to run."""


class LivePrior:
    """The live prior of the repository `root`; its file is read again after it was replaced.

    classes: names by index. arithmetic: the module models.prior or its copy.
    """

    def __init__(self, root, classes, arithmetic):
        self.path, self.classes, self.arithmetic = Path(root) / NAME, classes, arithmetic
        self.file_state, self.log_prior = None, None

    def log(self):
        """Log of the live prior, float64 [C]. Raises NoLivePrior."""
        try:
            stat = self.path.stat()
            state = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if state != self.file_state:
                if stat.st_size > MAX_BYTES:
                    raise NoLivePrior(f"{NAME} is larger than {MAX_BYTES} bytes; {HINT}")
                self.log_prior = self.arithmetic.log_target_prior(self._read())
                self.file_state = state
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "this repository has none" if missing else f"{NAME}: {error.strerror}"
            raise NoLivePrior(f"{reason}; {HINT}") from None
        return self.log_prior

    def _read(self):
        try:
            content = json.loads(self.path.read_bytes())
            if content["format"] != FORMAT:
                raise ValueError(f"format is {content['format']!r}, expected {FORMAT}")
            classes, prior = content["classes"], content["prior"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise NoLivePrior(f"{NAME} is no live prior ({error}); {HINT}") from None
        if classes != self.classes:
            raise NoLivePrior(f"{NAME} is of other classes; {HINT}")
        try:
            return self.arithmetic.check_target_prior(self.arithmetic.check_numbers(prior), len(self.classes))
        except (ValueError, TypeError, OverflowError) as error:
            raise NoLivePrior(f"{NAME}: {error}; {HINT}") from None
