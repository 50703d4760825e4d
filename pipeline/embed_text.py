"""Stage `embed_text`: compute the features of sentences about each class; writes artifacts/text/."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.command_line import stage_main
from pipeline.data.split_tables import load_classes
from pipeline.params import Params
from pipeline.shared.artifacts import TEXT
from pipeline.text.stored import write_no_features, write_text_features
from serving.shared.terminal import counted, print


@dataclass(frozen=True)
class Result:
    """Numbers of the stage. encoder: its name; None without section `text`."""

    sentences: int
    classes: int
    width: int
    encoder: str | None
    output: Path

    def __str__(self) -> str:
        if self.encoder is None:
            return f"no section text in params.yaml, nothing to compute → {self.output}"
        size = f"{counted(self.sentences, 'feature')} of {counted(self.classes, 'class')}, {self.width} values each"
        return f"{self.encoder}: {size} → {self.output}"


def run(params: Params, output: Path = TEXT) -> Result:
    """Compute the features of section `text`; without this section, write a folder without features.

    Raises as `text_features` does.
    """
    if params.text is None:
        write_no_features(output)
        return Result(0, 0, 0, None, output)
    from pipeline.text.compute import text_features

    text, remarks = text_features(params.text, load_classes())
    write_text_features(output, text)
    for remark in remarks:
        print(f"embed_text: {remark}", file=sys.stderr)
    return Result(*text.features.shape[:1], len(text.class_names), text.features.shape[1], text.record["model"], output)


if __name__ == "__main__":
    sys.exit(stage_main(run, "Compute the features of sentences about each class, the centres of the GML loss."))
