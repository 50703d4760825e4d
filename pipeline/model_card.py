"""The model card that goes with an exported student: Markdown with the metadata block of the Hugging Face format."""

from __future__ import annotations

from typing import Any

import jinja2

from pipeline.params import Params
from pipeline.prior import Prior

CARD = """\
---
library_name: onnx
pipeline_tag: image-classification
tags:
- long-tailed
- logit-adjustment
---

# Student of a GML run

An image classifier for {{ prior.classes | length }} classes, trained on data whose largest class has {{ prior.counts | max }}
samples and whose smallest has {{ prior.counts | min }} ({{ params.data.source }}, profile {{ params.data.profile }}).

- Network: {{ params.student.backbone }} with a cosine classifier, distilled from {{ params.teacher.backbone }} with the GML
  loss (ICML 2023, Mutual Information Maximization between Latent Features and Ground-Truth Labels).
- Input: RGB, uint8, {{ params.image.size }}x{{ params.image.size }}; normalisation is inside the graph.
- `strength` 0 answers for a balanced target prior, 1 for the training prior.

## Test metrics

| target prior | all | many | medium | few | balanced accuracy | NLL | ECE |
|---|---|---|---|---|---|---|---|
{% for name, m in metrics.items() -%}
| {{ name }} | {{ m["all"] | percent }} | {{ m.many | percent }} | {{ m.medium | percent }} | {{ m.few | percent }} \
| {{ m.balanced_accuracy | percent }} | {{ "%.3f" % m.nll }} | {{ m.ece | percent }} |
{% endfor %}
Last epoch, seed {{ params.seed }}, one run. Few means fewer than 20 training samples, many more than 100.

## Classes

| class | training samples | group |
|---|---|---|
{% for name in prior.classes -%}
| {{ name | cell }} | {{ prior.counts[loop.index0] }} | {{ prior.groups[loop.index0] }} |
{% endfor %}"""


def model_card(params: Params, prior: Prior, metrics: dict[str, Any]) -> str:
    """The card's text. metrics: target prior → metric, of the student on the test split."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.filters["percent"] = lambda value: "n/a" if value is None else f"{value:.1%}"
    environment.filters["cell"] = lambda text: " ".join(text.split()).replace("|", "\\|")
    return environment.from_string(CARD).render(params=params, prior=prior, metrics=metrics)
