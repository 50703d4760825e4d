"""Model card of a student: Markdown with the metadata block of the Hugging Face format."""

from __future__ import annotations

from typing import Any

import jinja2
import yaml

from models.sample_size import from_json, warnings_of
from pipeline.data.class_prior import Prior
from pipeline.model_io.checkpoint import describe_memory, describe_second_stage
from pipeline.params import DataParams, Params, StudentParams, TrainingParams
from serving.shared.terminal import counted

# Metric names for the metadata: Tailor's name → Hugging Face's.
METRICS = {"balanced_accuracy": "balanced_accuracy", "all": "accuracy", "ece": "expected_calibration_error"}

CARD = """\
---
{{ metadata }}---

# Student of a Tailor run

An image classifier for {{ prior.classes | length }} classes, trained on data whose largest class has {{ prior.counts | max }}
samples and whose smallest has {{ prior.counts | min }} ({{ data.source }}, profile {{ data.profile }}).

{% for term, text in facts %}
- **{{ term }}**: {{ text | cell }}
{% endfor %}

## Use

The model is for images like its training images. It always predicts one of its classes, also for an image that belongs
to none of them. Choose the target prior by the data to classify: strength 0 if all classes are equally frequent, 1 if
their frequencies are those of training, or a prior of your own.

## Test metrics

| target prior | all | many | medium | few | balanced accuracy | NLL | ECE |
|---|---|---|---|---|---|---|---|
{% for name, m in metrics.items() %}
| {{ name }} | {{ m["all"] | percent }} | {{ m.many | percent }} | {{ m.medium | percent }} | {{ m.few | percent }} \
| {{ m.balanced_accuracy | percent }} | {{ "%.3f" % m.nll }} | {{ m.ece | percent }} |
{% endfor %}

{% for line in few %}
**Too few test images.** {{ line }}.

{% endfor %}
Last epoch, seed {{ seed }}, one run. Few means fewer than 20 training samples, many more than 100.

## Classes

| class | training samples | group |
|---|---|---|
{% for name in prior.classes %}
| {{ name | cell }} | {{ prior.counts[loop.index0] }} | {{ prior.groups[loop.index0] }} |
{% endfor %}
"""

LOSSES = {
    "cross_entropy": "cross-entropy", "focal": "focal loss", "sigmoid_focal": "sigmoid focal loss", "ldam": "LDAM",
    "smoothing": "cross-entropy with label smoothing", "lade": "LADE",
}  # fmt: skip
CONTRASTS = {
    "supcon": "SupCon", "bcl": "BCL", "paco": "PaCo", "gpaco": "GPaCo", "kcl": "KCL", "tsc": "TSC", "proco": "ProCo",
    "hybrid_sc": "Hybrid-SC", "crd": "CRD", "concutmix": "ConCutMix",
}  # fmt: skip


def model_card(
    data: DataParams, backbone: str, seed: int, facts: list[tuple[str, str]], prior: Prior, metrics: dict[str, Any]
) -> str:
    """Render the card. facts: of `model_facts`; metrics: target prior → metric, of the student on the test split."""
    return render_card(
        CARD, _metadata(data, backbone, metrics),
        facts=facts, data=data, seed=seed, prior=prior, metrics=metrics,
        few=warnings_of(from_json(metrics["balanced"].get("test_images", {}))),
    )  # fmt: skip


def network_name(params: Params) -> str:
    """Return the name of the student's network for the card: its pretrained encoder, or its backbone."""
    return params.encoder.name if params.encoder else params.student.backbone


def render_card(template: str, metadata: dict[str, Any], **context: Any) -> str:
    """Render a card in the format of the Hugging Face Hub: a YAML block, then Markdown."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"percent": lambda value: "n/a" if value is None else f"{value:.1%}", "cell": as_cell}
    block = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return environment.from_string(template).render(metadata=block, **context)


def model_facts(
    teacher: TrainingParams,
    student: StudentParams,
    size: int,
    strength: float,
    prior: Prior,
    encoder: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    second_stage: dict[str, Any] | None = None,
) -> list[tuple[str, str]]:
    """Facts about the model as (term, text) pairs. size: image side in pixels. strength: the default strength in serving.

    encoder: the record of the pretrained encoder, frozen or tuned; None for a network without one. memory:
    ModelConfig.memory of the student; second_stage: ModelConfig.second_stage.
    """
    network, facts = student.backbone + describe_experts(student), []
    classifier = f"a {student.classifier.kind} classifier of {counted(len(prior.classes), 'class')}"
    trained = describe_training(teacher, student, encoder)
    if second_stage:
        classifier = f"a linear classifier of {counted(len(prior.classes), 'class')}"
        trained += f"; second stage: {describe_second_stage(second_stage)}"
    alone = memory is not None and memory["classifier"] == "memory"
    if alone:
        classifier, trained = (
            f"a memory of {counted(len(prior.classes), 'class')}",
            "none: the memory is the only classifier",
        )
    if encoder:
        adapter = ", a residual adapter" if student.adapter and not alone else ""
        network = f"{tuned_name(encoder['name'], student)}{adapter}"
        text = (
            f"{encoder['name']}, licence {encoder['licence']}; weights {encoder['source']}, sha256 {encoder['sha256']}"
        )
        facts = [("Pretrained encoder", text)]
    if memory:
        facts.append(("Memory of training features", describe_memory(memory)))
    return [
        ("Network", f"{network} {'and' if student.experts else 'with'} {classifier}"),
        ("Training", trained),
        ("Input", f"RGB, uint8, {size}x{size}; normalisation is inside the graph"),
        ("Output", "logits of every class; strength 0 is for a balanced target prior, 1 for the training prior"),
        ("Default strength", f"{strength:g}"),
        *facts,
    ]


def describe_experts(student: StudentParams) -> str:
    """Describe how many experts a student's network has and what they share, such as ` with 3 experts on one trunk`."""
    if student.experts is None:
        return ""
    shared = {
        "early": " on one trunk",
        "late": " after one trunk",
        "map": " on one feature map",
        "nothing": ", each a whole network,",
    }
    return f" with {student.experts.count} experts{shared[student.experts.shared]}"


def describe_training(teacher: TrainingParams, student: StudentParams, encoder: dict[str, Any] | None) -> str:
    """Describe a student's epochs, its loss terms with a weight above 0, and the teacher if one of them needs it."""
    if student.experts:
        names = {"ride": "RIDE", "sade": "SADE", "ncl": "NCL", "reslt": "ResLT", "bbn": "BBN"}
        return f"{counted(student.epochs, 'epoch')} with the loss of {names[student.experts.kind]}"
    loss = LOSSES[student.loss.kind]
    adjusted = f"logit-adjusted {loss}" if student.adjustment else loss
    gml = "the GML loss (ICML 2023, Mutual Information Maximization between Latent Features and Ground-Truth Labels)"
    keys = {
        "text": " with text features as centres",
        "teacher_and_text": " and a second one with text features as centres",
    }
    gml += keys.get(student.contrast_encoder, "")
    contrast = gml if student.contrast.kind == "gml" else CONTRASTS[student.contrast.kind]
    terms = [name for name, weight in ((adjusted, student.gamma), (contrast, student.beta)) if weight]
    distilled = ["distillation"] if student.alpha else []
    needed = student.alpha or (student.beta and student.contrast_encoder in ("teacher", "teacher_and_text"))
    network = f"classifier on frozen {encoder['name']}" if encoder else teacher.backbone
    epochs = counted(teacher.epochs, "epoch")
    by = f"; teacher: {network}, {epochs}" if needed else ""
    return f"{counted(student.epochs, 'epoch')} with {' + '.join(terms + distilled)}{by}"


def tuned_name(name: str, student: StudentParams) -> str:
    """Return the name of an encoder and how it was tuned, such as `efficientnet_lite0 (last 2 blocks tuned)`."""
    how = {
        "last_blocks": f"last {counted(student.tune_blocks, 'block')} tuned",
        "lora": f"tuned by LoRA of rank {student.tune_rank}, merged into the weights",
        "adaptformer": f"with an AdaptFormer adapter of {counted(student.tune_rank, 'hidden unit')} in each block",
        "all": "all weights tuned",
    }
    return f"frozen {name}" if student.tune == "none" else f"{name} ({how[student.tune]})"


def as_cell(text: str) -> str:
    """Escape text for a Markdown table cell: one line, no `|`, no HTML tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _metadata(data: DataParams, backbone: str, metrics: dict[str, Any]) -> dict[str, Any]:
    dataset = {"name": f"{data.source}, {data.profile} profile", "type": data.source, "split": "test"}
    results = [
        {"type": kind, "value": round(values[key], 6), "name": f"{kind.replace('_', ' ')}, target prior {prior}"}
        for prior, values in metrics.items()
        for key, kind in METRICS.items()
        if values[key] is not None
    ]
    index = {
        "name": f"tailor-{data.source}-{backbone.replace('/', '-')}",
        "results": [{"task": {"type": "image-classification"}, "dataset": dataset, "metrics": results}],
    }
    return {
        "library_name": "onnx", "pipeline_tag": "image-classification", "tags": ["long-tailed", "logit-adjustment"],
        "metrics": ["accuracy"], "model-index": [index],
    }  # fmt: skip
