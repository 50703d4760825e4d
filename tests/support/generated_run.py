"""Generated predictions for any number of classes, and their report, without training."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from models.prior import shot_group
from pipeline.answers.fit import fit_answers
from pipeline.answers.reasons import Mistake, Neighbour
from pipeline.data.class_prior import Prior
from pipeline.evaluate import choose_samples
from pipeline.evaluation.metrics import adjusted_probabilities, per_class_accuracy
from pipeline.evaluation.network_metrics import network_metrics
from pipeline.report import Evaluation, Provenance, analyse_predictions, render_report
from pipeline.report.data_card import SplitSizes, data_facts
from pipeline.report.model_card import model_card, model_facts
from tests.support.making import params, png

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>fetch('https://example.com/')</script>",
    "<img src=x onerror=alert(1)>",
    '"><a href="javascript:alert(1)">',
    "{{ 7 * 7 }}",
    "<b>bold</b> & <br>",
    "a|b\u2028c",
    "Ω naïve 猫",
]


def made_prior(classes: int) -> Prior:
    """Return a prior of classes with 500 to 5 training images; the first ones have hostile names."""
    counts = np.maximum(500 * 0.01 ** np.linspace(0, 1, classes), 5).astype(int).tolist()
    names = [*HOSTILE, *(f"species {c} of a genus" for c in range(len(HOSTILE), classes))][:classes]
    p = np.array(counts) / sum(counts)
    return Prior(names, counts, p.tolist(), np.log(p).tolist(), [shot_group(count) for count in counts])


def made_logits(labels: np.ndarray, prior: Prior, seed: int, skill: float = 4.0) -> np.ndarray:
    """Return logits [N,C] that are more accurate for larger classes, and confuse a class with the next one."""
    random, classes = np.random.default_rng(seed), len(prior.classes)
    logits = random.normal(size=(len(labels), classes)).astype(np.float32)
    logits[np.arange(len(labels)), labels] += skill * (0.5 + np.log(np.array(prior.counts)) / 6)[labels]
    logits[np.arange(len(labels)), (labels + 1) % classes] += 3
    return logits * 1.7


@lru_cache
def made_report(
    classes: int, per_class: int, validation: bool = True, champion: bool = False, heat_map: bool = True
) -> str:
    """Return the report of generated predictions, built as in `evaluate`."""
    prior, recipe = made_prior(classes), params()
    labels = np.repeat(np.arange(classes), per_class)
    logits = {name: made_logits(labels, prior, seed) for seed, name in enumerate(("teacher", "student"))}
    answers = fit_answers(
        (made_logits(labels, prior, 2), labels) if validation else None, (logits["student"], labels), prior,
        recipe.evaluate, recipe.serving,
    )  # fmt: skip
    previous = champion_of(labels, prior, champion)
    found = analyse_predictions(
        logits,
        labels,
        prior,
        recipe.evaluate.ece_bins,
        recipe.data.seed,
        temperature=answers.temperature,
        champion=previous,
        draws=1,
    )
    log_prior = np.array(prior.log_prior)
    given = {
        name: adjusted_probabilities(logits["student"], log_prior, strength)
        for name, strength in (("balanced", 0), ("train", 1))
    }
    metrics = {name: network_metrics(values, labels, prior, recipe.evaluate) for name, values in logits.items()}
    right = {name: per_class_accuracy(p.argmax(1), labels, classes) for name, p in given.items()}
    rows = [
        {
            "class": name, "group": prior.groups[c], "train_count": prior.counts[c], "test_count": per_class,
            **{f"{network}_{p}": right[p][c] for network in ("teacher", "student") for p in right},
        }
        for c, name in enumerate(prior.classes)
    ]  # fmt: skip
    samples = [
        {
            "file": f"{row:03d}.png", "label": prior.classes[labels[row]], "bytes": png(row),
            **{name: prior.classes[int(p[row].argmax())] for name, p in given.items()},
        }
        for row in choose_samples(given, 12, 0)
    ]  # fmt: skip
    sizes = SplitSizes(sum(prior.counts), len(labels), len(labels))
    provenance = Provenance("2026-11-28 04:00 UTC", "0123abc+changes", made_histories(validation))
    facts, about = data_facts(recipe.data, recipe.image, prior, sizes), facts_of_the_model(prior)
    heat = np.array([[0, 1], [1, 3]], dtype=np.float32) if heat_map else None
    mistake = Mistake(0, prior.classes[0], prior.classes[1], 0.9, [Neighbour(1, prior.classes[0], 0.75)], heat)
    return render_report(
        Evaluation(
            found, metrics, rows, samples, prior, png, facts, about, recipe.model_dump(mode="json"),
            provenance, answers=answers, mistakes=[mistake], train_image=png,
        )
    )  # fmt: skip


def facts_of_the_model(prior: Prior) -> list[tuple[str, str]]:
    """Return the facts of a model card for the default params."""
    recipe = params()
    return model_facts(recipe.teacher, recipe.student, recipe.image.size, recipe.serving.strength, prior)


def made_model_card(prior: Prior, metrics: dict) -> str:
    """Return the model card for the default params."""
    recipe = params()
    return model_card(recipe.data, recipe.student.backbone, recipe.seed, facts_of_the_model(prior), prior, metrics)


def made_histories(validation: bool) -> dict[str, list[dict[str, float]]]:
    """Return histories of five epochs of teacher and student, with or without validation accuracies."""
    score = {"validation_accuracy": 0.5} if validation else {}
    return {
        name: [{"epoch": epoch, "loss": loss / epoch, **score} for epoch in range(1, 6)]
        for name, loss in (("teacher", 3.0), ("student", 6.0))
    }


def champion_of(labels: np.ndarray, prior: Prior, there: bool):
    """Return slightly worse predictions of a champion; None without `there`."""
    from pipeline.evaluation.predictions import Predictions

    if not there:
        return None
    p = adjusted_probabilities(made_logits(labels, prior, 5, skill=3.5), np.array(prior.log_prior), 0.0)
    return Predictions([f"{i:06d}" for i in range(len(labels))], labels, p, prior)
