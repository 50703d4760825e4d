"""Data card: description of the training and test data in the dataset-card format of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.networks.memory_fit import MINIMUM_IMAGES
from models.prior import GROUPS
from pipeline.data.class_prior import Prior
from pipeline.params import DataParams, ImageParams
from pipeline.report.model_card import render_card
from serving.shared.terminal import counted

# Size categories of the Hub: upper bound (exclusive) → name.
BRACKETS = {
    10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M", 10**8: "10M<n<100M"
}  # fmt: skip
SHOWN = 1000  # classes that the card lists; manifest.json and per_class.csv have all

CARD = """\
---
{{ metadata }}---

# Data of a long-tailed classifier

{% for term, text in facts %}
- **{{ term }}**: {{ text | cell }}
{% endfor %}

## Splits

| split | images | use |
|---|---|---|
| train | {{ sizes.train }} | training; its class frequencies are the training prior |
| validation | {{ sizes.validation }} | {{ validation_use }} |
| test | {{ sizes.test }} | the reported metrics; only the evaluation reads it |

`data/split/*.parquet` has the sample id and the sha256 of the bytes of each image; `data/split/duplicates.csv` lists
byte-identical images in two splits.

## Classes

| class | training images | group |
|---|---|---|
{% for name in prior.classes[:shown] %}
| {{ name | cell }} | {{ prior.counts[loop.index0] }} | {{ prior.groups[loop.index0] }} |
{% endfor %}
{% if prior.classes | length > shown %}

The first {{ shown }} of {{ prior.classes | length }} classes; `per_class.csv` has all.
{% endif %}

## Limits

The table shows the class imbalance of training: a metric of a class with few images is uncertain. Tailor has no
information about the authors and the licence of the images; add both before you publish this card.
"""


@dataclass(frozen=True)
class SplitSizes:
    """Number of images of each split."""

    train: int
    validation: int
    test: int


def data_card(
    data: DataParams,
    facts: list[tuple[str, str]],
    prior: Prior,
    sizes: SplitSizes,
    memory: dict[str, Any] | None = None,
) -> str:
    """Render the card: a YAML block that huggingface_hub reads, then Markdown.

    facts: see `data_facts`. memory: ModelConfig.memory of the student; its tau and weight are fitted on validation.
    """
    total = sizes.train + sizes.validation + sizes.test
    metadata = {
        "pretty_name": f"Tailor {data.source}, {data.profile} profile",
        "task_categories": ["image-classification"],
        "size_categories": [next((name for end, name in BRACKETS.items() if total < end), "100M<n<1B")],
        "tags": ["long-tailed", "image"],
    }
    uses = ["selection of an epoch", "the temperature of the calibration"]
    if memory and memory["validation_images"] >= MINIMUM_IMAGES:
        uses.append("tau and weight of the memory")
    return render_card(
        CARD, metadata, facts=facts, prior=prior, sizes=sizes, shown=SHOWN, validation_use=", ".join(uses)
    )


def data_facts(data: DataParams, image: ImageParams, prior: Prior, sizes: SplitSizes) -> list[tuple[str, str]]:
    """Facts about the data as (term, text) pairs."""
    profile = "natural" if data.profile == "natural" else f"{data.profile}, imbalance factor {data.imbalance_factor:g}"
    groups = ", ".join(f"{prior.groups.count(name):,} {name}" for name in GROUPS)
    most = max(prior.counts)
    return [
        ("Source", data.source if data.source == "digits" else f"{data.source} at {data.location}"),
        ("Images", f"{sizes.train:,} for training, {sizes.validation:,} for validation, {sizes.test:,} for the test"),
        ("Classes", f"{len(prior.classes):,}: {groups}"),
        ("Long tail", f"{profile}; {counted(most, 'image')} in the largest class, {min(prior.counts):,} in the smallest"),
        ("Network input", f"RGB, {image.size}x{image.size} pixels, from a shorter side of {image.resize_to}"),
        ("Selection", f"images selected and held out with seed {data.seed}"),
    ]  # fmt: skip
