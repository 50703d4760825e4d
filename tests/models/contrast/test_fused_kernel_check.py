"""Check of the fused kernels: used where their results are correct; otherwise the plain version, with the reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.contrast.fused_kernel_check import kernels_supported

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")

ROOT = Path(__file__).parents[3]

# Faults injected into forward or backward of the kernels' autograd function, and the expected message.
FAULTS = {
    "another value": ("forward", "lambda ctx, *i: tuple(o * 1.001 for o in forward(ctx, *i))", "own is off by 1.0e-03 of its"),
    "no number": ("forward", "lambda ctx, *i: tuple(o * float('nan') for o in forward(ctx, *i))", "own is off by nan"),
    "another gradient": (
        "backward", "lambda ctx, *g: (backward(ctx, *g)[0], None, None, g[2].sum())", "d temperature is off by",
    ),
    "an error of the driver": (
        "forward", "raising(RuntimeError('Triton Error [CUDA]: out of\\n memory'))", "Triton Error [CUDA]: out of memory",
    ),
    "an error of the compiler": (
        "forward", "raising(OutOfResources(300000, 232448, 'shared memory'))", "out of resource: shared memory",
    ),
    "no C compiler": ("forward", "raising(FileNotFoundError(2, 'No such file or directory', 'gcc'))", "gcc"),
}  # fmt: skip

# In a separate process, because Triton's interpreter is selected before the kernels are created. It runs kernels on
# the CPU, so everything but CUDA itself and the times is as on a GPU.
PROGRAM = """
import contextlib, io, json, sys
import torch
from triton.runtime.errors import OutOfResources
import models.contrast.fused_kernel, models.contrast.fused_kernel_check
from models.contrast.gml import ClassSegments, OwnClassLogSumExp, contrast_losses
from models.contrast.fused_kernel import FusedOwnClassLogSumExp

models.contrast.fused_kernel.BLOCK = 16
lengths = torch.tensor([30, 7, 3])
runs = ClassSegments(torch.repeat_interleave(torch.arange(3), lengths), lengths.cumsum(0) - lengths, lengths, 30)
similarity = torch.rand(4, 40, generator=torch.Generator().manual_seed(0))
forward, backward = FusedOwnClassLogSumExp.forward, FusedOwnClassLogSumExp.backward
calls = 0

def counted(function):
    def call(ctx, *inputs):
        global calls
        calls += 1
        return function(ctx, *inputs)
    return call

def raising(error):
    def fails(ctx, *inputs):
        raise error
    return fails

def losses(fused):
    leaf = similarity.clone().requires_grad_()
    actual = contrast_losses(
        leaf, runs, torch.tensor([0, 1, 2, 0]), torch.tensor([0.6, 0.3, 0.1]).log(), 0.1,
        query_ids=torch.arange(4), key_ids=-torch.arange(1, 41), fused=fused,
    )
    (actual.gml + actual.tau).backward()
    return torch.cat([torch.stack([part.detach() for part in actual]), leaf.grad.flatten()])

def outcome():
    global calls
    models.contrast.fused_kernel_check.CHECKED.clear()
    calls = 0
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        actual = [losses("auto"), losses("auto")]
    return {
        "bits of plain": all(torch.equal(one, plain) for one in actual),
        "near plain": all(torch.allclose(one, plain, rtol=1e-5, atol=1e-5) for one in actual),
        "calls": calls, "lines": stderr.getvalue().splitlines(),
    }

plain = losses(False)
outcomes = {}
for name, (method, fault, _) in {"": ("forward", "forward", ""), **json.loads(sys.argv[1])}.items():
    FusedOwnClassLogSumExp.forward, FusedOwnClassLogSumExp.backward = staticmethod(counted(forward)), staticmethod(backward)
    fault = eval(fault)
    setattr(FusedOwnClassLogSumExp, method, staticmethod(counted(fault) if method == "forward" else fault))
    outcomes[name] = outcome()
FusedOwnClassLogSumExp.forward = staticmethod(counted(forward))
sys.modules["triton.errors"] = None
outcomes["no Triton"] = outcome()
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By fault ("": none): whether two losses were computed by the plain version, number of kernel calls, message."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(FAULTS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_correct_kernels_are_checked_once_and_then_used(outcomes):
    right = outcomes[""]
    assert right["lines"] == [] and right["near plain"]
    assert right["calls"] == 3  # the check and two losses


@pytest.mark.parametrize("name", [*FAULTS, "no Triton"])
def test_faulty_kernels_are_replaced_by_the_plain_version_with_one_line(outcomes, name):
    actual = outcomes[name]
    assert actual["bits of plain"]
    assert actual["calls"] == (0 if name == "no Triton" else 1)  # only the check ran them
    (line,) = actual["lines"]
    assert line.startswith("contrast losses on cpu at [4, 40]: plain version, not the fused kernels: ")
    assert (FAULTS[name][2] if name in FAULTS else "Triton cannot be imported") in line


def test_kernels_are_not_supported_without_a_gpu():
    assert os.environ.get("TRITON_INTERPRET") is None
    assert not kernels_supported(torch.zeros(2, 3))


def test_kernels_do_not_support_double_precision(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels_supported(torch.zeros(2, 3))
    assert not kernels_supported(torch.zeros(2, 3, dtype=torch.float64))
