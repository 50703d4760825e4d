"""Stage `classifier`: refit the student's classifier on its features, a second stage; writes artifacts/classifier/."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.command_line import stage_main
from pipeline.params import Params
from pipeline.shared.artifacts import CLASSIFIER, STUDENT, whole_folder, write_json
from serving.shared.terminal import counted

RECORD = "second_stage.json"


@dataclass(frozen=True)
class Result:
    """Record of the second stage, ModelConfig.second_stage; None without one."""

    record: dict[str, Any] | None
    output: Path

    def __str__(self) -> str:
        if self.record is None:
            return f"no second stage in params.yaml, the student keeps its classifier → {self.output}"
        from pipeline.model_io.checkpoint import describe_second_stage  # loads PyTorch

        before, after = (self.record["balanced_accuracy"][time] for time in ("before", "after"))
        images = counted(self.record["validation_images"], "validation image")
        score = images if before is None else f"balanced accuracy on {images} {before:.1%} → {after:.1%}"
        return f"{describe_second_stage(self.record)}: {score} → {self.output}"


def run(params: Params, output: Path = CLASSIFIER, student: Path = STUDENT) -> Result:
    """Write the student with a refitted classifier; with classifier.kind `none`, only a record of that.

    The student is not trained again. Raises as `refit_student` does.
    """
    if params.classifier.kind == "none":
        with whole_folder(output) as folder:
            write_json(folder / RECORD, {"kind": "none"})
        return Result(None, output)
    from pipeline.second_stage.refit import refit_student  # loads PyTorch, which takes seconds

    return Result(refit_student(params, student, output), output)


if __name__ == "__main__":
    sys.exit(stage_main(run, "Refit the classifier of the trained student on its features (second stage)."))
