"""The cost goals that do not depend on time: tensors of CRD, operations of ProCo; and the verdict of the table."""

import pytest

from benchmarks.method_steps import REFERENCE, Timed, crd_largest_tensor, proco_operations, table
from pipeline.methods.catalogue import find_methods


@pytest.mark.parametrize("dim", [16, 64])
def test_crd_makes_no_tensor_of_all_negatives_times_the_dimensions(dim):
    batch, negatives, images = 8, 400, 90
    assert (
        batch * negatives <= crd_largest_tensor(batch, negatives, dim, images) <= 2 * batch * (negatives + 1)
    )  # int64


def test_proco_needs_as_many_operations_for_many_classes_and_images_as_for_few():
    assert proco_operations(2, 3, 128) == proco_operations(16, 500, 128) == proco_operations(2, 3, 256)


def side(name: str, steps: list[float], networks: list[float]) -> Timed:
    return Timed(*find_methods([name]), print, print, steps, networks)


def test_a_method_that_costs_more_than_gml_beyond_its_images_misses_the_goal():
    text = table(
        [
            side(REFERENCE, [1.0, 1.1, 1.0], [0.8, 0.9, 0.8]),
            side("bcl", [1.6, 1.5, 1.5], [1.3, 1.3, 1.3]),
            side("paco", [1.5, 1.5, 1.5], [1.0, 1.0, 1.0]),
        ]
    )
    rows = {line.split("`")[1]: line.rsplit("|", 2)[1].strip() for line in text.splitlines() if "`" in line}
    assert rows == {"gml": "reference", "bcl": "met", "paco": "missed"}
    assert "loop-free, met" in text
