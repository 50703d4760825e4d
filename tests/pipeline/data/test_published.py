"""Published splits: the six CIFAR-LT selections from labels alone, and the message for a different selection."""

import numpy as np
import pytest

from pipeline.data import assignment, profiles, published
from pipeline.shared.errors import DataError
from pipeline.sources import Row
from tests.support.making import ROOT, params


def cifar_rows(source):
    """Return the rows of the real archive, shuffled like its batches."""
    classes = 10 if source == "cifar10" else 100
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(classes), 50_000 // classes)).tolist()
    train = [Row(f"train#{i}", label, f"train#{i}", "train") for i, label in enumerate(labels)]
    return [*train, *(Row(f"test#{i}", i % classes, f"test#{i}", "test") for i in range(10_000))], classes


def cifar_params(source, factor, **more):
    made = {
        "source": source,
        "profile": "exponential",
        "imbalance_factor": factor,
        "seed": 0,
        "validation_per_class": 0,
    }
    return params({f"data.{key}": value for key, value in {**made, **more}.items()}).data


@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
def test_the_split_of_each_published_factor_passes_and_has_its_size(source):
    rows, classes = cifar_rows(source)
    for factor in (10, 50, 100):
        actual = assignment.assign(rows, [str(c) for c in range(classes)], cifar_params(source, factor), source)
        assert len(actual["train"]) == published.CIFAR_LT[source, factor][0] and len(actual["test"]) == 10_000


def test_another_choice_than_the_published_one_stops_the_split(monkeypatch):
    rows, _ = cifar_rows("cifar10")
    choose = profiles.choose_images
    monkeypatch.setattr(assignment, "choose_images", lambda labels, sizes, seed: choose(labels, sizes, seed + 1))
    with pytest.raises(DataError) as caught:
        assignment.assign(rows, list("0123456789"), cifar_params("cifar10", 100), "cifar10")
    assert "cifar10: the images kept at imbalance factor 100 hash to " in str(caught.value)
    assert "the published split to 8a54f5b6fa972295; results would not be comparable" in str(caught.value)


@pytest.mark.parametrize(
    "more", [{"seed": 1}, {"profile": "step"}, {"imbalance_factor": 20.0}, {"imbalance_factor": 10.5}]
)
def test_params_of_another_split_have_no_published_choice(more):
    assert published.published_choice("cifar10", cifar_params("cifar10", 10, **more)) is None


def test_published_figures_are_consistent():
    for data_set in published.PUBLISHED.values():
        assert sum(data_set.groups.values()) == data_set.classes
        assert data_set.smallest * data_set.classes <= data_set.images["train"] <= data_set.largest * data_set.classes


def test_the_page_on_published_data_shows_the_figures_that_the_check_compares_with():
    page = (ROOT / "docs/published-data.md").read_text(encoding="utf-8")
    for name, data_set in published.PUBLISHED.items():
        images = [data_set.images.get(split) for split in ("train", "validation", "test")]
        figures = [
            *images,
            data_set.classes,
            data_set.largest,
            data_set.smallest,
            *data_set.groups.values(),
        ]
        row = " | ".join("" if figure is None else f"{figure:,}" for figure in figures).replace("|  |", "| |")
        assert f"| `{name}` | {row} |" in page
    for images, digest in published.CIFAR_LT.values():
        assert f"{images:,} `{digest}`" in page
