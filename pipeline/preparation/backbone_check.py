"""`python -m pipeline.preparation.backbone_check`: check that a backbone runs at an image size and exports to ONNX.

The training stages run it in a separate process and use the exit status: the errors of these networks have no common
type, and an export can crash the process.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from importlib.util import find_spec
from types import TracebackType

import torch

from models.networks.cosine_classifier import ImageClassifier
from pipeline.model_io.encoder import build_encoder
from pipeline.onnx_export.graph import ServedStudent, to_onnx

CLASSES = 3


def main(backbone: str, size: int, opset: int | None, encoder: bool = False) -> None:
    """Build the network, run a forward pass in training mode on two images, and export it unless opset is None.

    encoder: True if backbone is the name of an encoder (timm/<model>).
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    model = ImageClassifier(build_encoder(backbone, size) if encoder else backbone, CLASSES, 1 / 30, size)
    model.train()(torch.rand(2, 3, size, size))
    if opset is not None and find_spec("onnx") and find_spec("onnxscript"):
        served = ServedStudent(model.eval(), [0.5] * 3, [0.5] * 3, [-1.0] * CLASSES).eval()
        with contextlib.redirect_stdout(io.StringIO()):
            to_onnx(served, size, opset)


def print_first_cause(_type: type[BaseException], error: BaseException, _traceback: TracebackType | None) -> None:
    """Print the first error of a chain in one line; the last one of an export is a page of advice about torch.onnx."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    sys.excepthook = print_first_cause
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None, "encoder" in sys.argv[4:])
