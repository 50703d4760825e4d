"""Memory freed by a step is kept for the next one."""

import os
import platform
import subprocess
import sys

import pytest

from pipeline.shared.host_memory import free_bytes

pytestmark = pytest.mark.slow

# In a separate process, since the advice applies until the process exits.
PROGRAM = """
import resource
import torch
from pipeline.shared.host_memory import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        held = [torch.ones(12 << 20) for _ in range(4)]  # 48 MiB each: more than glibc ever keeps by itself
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# The least of several steps: other programs make the kernel move or take pages, which only adds faults.
def least_faults():
    faults_of_a_step()
    return min(faults_of_a_step() for _ in range(5))

released = least_faults()
assert keep_freed_memory()
print(released, least_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc takes the advice")
def test_after_the_first_step_freed_memory_is_reused():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    released, reused = map(int, done.stdout.split())
    # With huge pages a page fault clears 2 MiB, without them 4 KiB.
    assert released > 100 and reused < released / 20


def test_free_memory_is_divided_between_the_processes_of_a_host(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = free_bytes()
    assert 0 < alone <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes() < alone / 2
