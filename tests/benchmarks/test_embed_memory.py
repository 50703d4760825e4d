"""benchmarks.encoders --memory: the peak of stage embed is that of a process of its own."""

from __future__ import annotations

import re

import pytest

from benchmarks import encoders


@pytest.mark.slow
def test_the_peak_of_each_number_of_images_is_printed_and_compared(capsys):
    assert encoders.report_memory("efficientnet_lite0", 32, [8, 24])
    printed = capsys.readouterr().out
    peaks = [float(peak.replace(",", "")) for peak in re.findall(r"images: peak ([\d,]+) MiB", printed)]
    assert len(peaks) == 2 and min(peaks) > 100  # PyTorch alone takes more
    assert "goal at most 1.1" in printed
