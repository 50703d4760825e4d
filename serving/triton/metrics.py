"""Prometheus metrics of `classifier`, beside Triton's own: requested priors, answered classes, confidence, refusals.

A call into Triton costs about 70 µs, a batch of a small network less than a millisecond, so counts gather here and one
thread hands over what changed, every FLUSH_EVERY seconds. Every label has a bounded set of values.
"""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import triton_python_backend_utils as pb_utils

FLUSH_EVERY = 2.0  # seconds
# Classes that get a label of their own; of more classes, this many runs of neighbours in training frequency do.
MAX_CLASS_LABELS = 100
CONFIDENCE_EDGES = np.arange(1, 11) / 10
FAMILIES = {
    "tailor_images_total": "Images answered, by the requested class prior: balanced, train, live, number, own",
    "tailor_top_class_total": "Images answered, by their most probable class and its shot group in training",
    # Triton counts a request as a success also where the model's response is an error.
    "tailor_refused_total": "Requests refused by the classifier, by reason",
    "tailor_failed_total": "Requests that the student did not answer",
    # A histogram in all but its type: Triton takes one observation a call, counters take what a whole batch adds.
    "tailor_confidence_bucket": "Images answered, by the probability of their most probable class, cumulative over le",
    "tailor_confidence_sum": "Sum of the probabilities of the most probable classes",
    "tailor_confidence_count": "Images answered, the count of the confidence histogram",
    "tailor_access_log_lost_total": "Lines that the access log could not write",
    "tailor_logit_log_total": "Images whose logits were logged",
    "tailor_logit_log_lost_total": "Images whose logits were to be logged and were not: queue (too many at once) or disk",
}


class Metrics:
    """Counts of one version's instance. Use from one thread; `close` hands over the last counts.

    classes: the class names. groups: the shot group of each. ranks: each class's place by training frequency, 0 the most
    frequent.
    """

    def __init__(self, version, classes, groups, ranks):
        self.version = str(version)
        self.class_labels = [
            {"class": label, "group": group} for label, group in zip(class_labels(classes, ranks), groups, strict=True)
        ]
        self.families = {
            name: pb_utils.MetricFamily(name=name, description=text, kind=pb_utils.MetricFamily.COUNTER)
            for name, text in FAMILIES.items()
        }
        self.metrics = {}
        self.counts = Counter()
        # A counter that is there before its first event has a rate when that event comes.
        for prior in ("balanced", "train", "live", "number", "own"):
            self._add("tailor_images_total", 0, prior=prior)
        for name in ("tailor_failed_total", "tailor_access_log_lost_total"):
            self._add(name, 0)
        for reason in ("queue", "disk"):
            self._add("tailor_logit_log_lost_total", 0, reason=reason)
        self.lock = threading.Lock()
        self.flushing = threading.Lock()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._flush_often, name="metrics", daemon=True)
        self.thread.start()

    def answered(self, priors, best, confidence):
        """Count answered images: `priors` how many by kind of prior, `best` [n] class indexes, `confidence` [n] in 0..1."""
        edges = np.searchsorted(CONFIDENCE_EDGES, confidence, side="left")
        with self.lock:
            for prior, count in priors.items():
                self._add("tailor_images_total", count, prior=prior)
            for index in best:
                self._add("tailor_top_class_total", 1, **self.class_labels[index])
            for place, edge in enumerate(CONFIDENCE_EDGES):
                self._add("tailor_confidence_bucket", int((edges <= place).sum()), le=f"{edge:.1f}")
            self._add("tailor_confidence_bucket", len(confidence), le="+Inf")
            self._add("tailor_confidence_sum", float(confidence.sum()))
            self._add("tailor_confidence_count", len(confidence))

    def count(self, family, number=1, **labels):
        """Add to a counter of FAMILIES."""
        with self.lock:
            self._add(family, number, **labels)

    def flush(self):
        """Hand what changed over to Triton."""
        with self.flushing:
            with self.lock:
                counts, self.counts = self.counts, Counter()
            for key, count in counts.items():
                if key not in self.metrics:
                    name, labels = key
                    self.metrics[key] = self.families[name].Metric(labels=dict(labels) | {"version": self.version})
                self.metrics[key].increment(count)

    def close(self):
        """Stop the thread and hand over the last counts."""
        self.closed.set()
        self.thread.join()
        self.flush()

    def _add(self, family, count, **labels):
        self.counts[family, tuple(labels.items())] += count

    def _flush_often(self):
        while not self.closed.wait(FLUSH_EVERY):
            self.flush()


def class_labels(classes, ranks):
    """The label of every class: its name, or where there are too many, `rank a-b`, the run of neighbours it lies in."""
    if len(classes) <= MAX_CLASS_LABELS:
        return list(classes)
    edges = np.linspace(0, len(classes), MAX_CLASS_LABELS + 1).astype(int)
    runs = np.searchsorted(edges, np.asarray(ranks), side="right")
    return [f"rank {edges[run - 1] + 1}-{edges[run]}" for run in runs]
