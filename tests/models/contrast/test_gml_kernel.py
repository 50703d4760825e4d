"""The fused Triton kernels without a GPU: results in Triton's interpreter, and compilation for NVIDIA GPUs."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")

ROOT = Path(__file__).parents[3]

# In a separate process: the interpreter is selected for the whole process before the kernels are created.
INTERPRETED = """
import torch
import models.contrast.fused_kernel
from models.contrast.gml import ClassSegments, contrast_losses
from models.losses import gml_loss, other_sample_mask

models.contrast.fused_kernel.BLOCK = 16  # several blocks a row, the last one not full
random = torch.Generator().manual_seed(0)
# At tau .001 an exponent is up to 2000, which float32 holds to 1e-4.
for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
    for lengths in ([3, 1, 30, 7, 2], [5], [16, 16], [1] * 20, [40, 1]):
        lengths = torch.tensor(lengths)
        classes, keys, batch = len(lengths), int(lengths.sum()), 6
        row_class = torch.repeat_interleave(torch.arange(classes), lengths)
        runs = ClassSegments(row_class, lengths.cumsum(0) - lengths, lengths, int(lengths.max()))
        target = torch.randint(classes, (batch,), generator=random)
        query_ids, key_ids = torch.arange(batch), -torch.arange(1, keys + 1)
        key_ids[runs.starts[target]] = query_ids
        log_prior = torch.rand(classes, generator=random, dtype=dtype).add(0.1).log()
        cosines = torch.rand(batch, keys, generator=random, dtype=dtype) * 2 - 1
        cosines[0] = torch.where(row_class == target[0], -1.0, 1.0)
        for tau in (0.001, 0.05, 1.0):
            results = []
            for fused in (True, False):
                similarity = cosines.clone().requires_grad_()
                log_tau = torch.tensor(tau, dtype=dtype).log().requires_grad_()
                if fused:
                    gml, of_tau, _ = contrast_losses(
                        similarity, runs, target, log_prior, log_tau.exp(), 0.7,
                        query_ids=query_ids, key_ids=key_ids, fused=True,
                    )
                else:
                    mask = other_sample_mask(query_ids, key_ids)
                    gml = gml_loss(similarity, row_class, target, log_prior, log_tau.detach().exp(), 0.7)
                    of_tau = gml_loss(similarity.detach(), row_class, target, log_prior, log_tau.exp(), 0.7, mask)
                (2 * gml + 3 * of_tau).backward()
                results.append((gml.detach(), of_tau.detach(), similarity.grad, log_tau.grad))
            for name, actual, expected in zip(("gml", "tau", "d similarity", "d log tau"), *results):
                error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
                assert error < tolerance, (name, dtype, lengths.tolist(), tau, error)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.contrast.fused_kernel import BLOCK, _kernels

IDS = {"own_first": "*i64", "own_last": "*i64"}
for kernel, constants in zip(_kernels(), ({"floor": -1e30, "block": BLOCK}, {"block": BLOCK})):
    kinds = {**IDS, **dict.fromkeys(("keys", "longest"), "i32"), **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    for capability in (80, 90):
        source = ASTSource(kernel, signature, constants)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        assert len(binary.asm["cubin"]) > 1000
"""


def run(program, monkeypatch, tmp_path, interpret):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_kernels_equal_the_reference_in_tritons_interpreter(monkeypatch, tmp_path):
    run(INTERPRETED, monkeypatch, tmp_path, "1")


def test_the_kernels_compile_for_ampere_and_hopper(monkeypatch, tmp_path):
    run(COMPILED, monkeypatch, tmp_path, "0")
