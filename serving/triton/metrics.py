"""Prometheus metrics of `classifier`: requested priors, predicted classes, confidence, rejected and failed requests.

A call into Triton takes about 70 µs, a batch of a small network less than 1 ms. So counts are summed here, and one
thread passes the changes to Triton every FLUSH_EVERY seconds. Every label has a bounded set of values.
"""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import triton_python_backend_utils as pb_utils

FLUSH_EVERY = 2.0  # seconds
# Largest number of class labels. With more classes, neighbours in training frequency share one of this many labels.
MAX_CLASS_LABELS = 100
CONFIDENCE_EDGES = np.arange(1, 11) / 10
FAMILIES = {
    "tailor_images_total": "Images answered, by the requested class prior: balanced, train, live, number, own",
    "tailor_top_class_total": "Images answered, by their most probable class and its shot group in training",
    # Counted here because Triton counts a request as a success also if the model's response is an error.
    "tailor_refused_total": "Requests refused by the classifier, by reason",
    "tailor_failed_total": "Requests that the student did not answer",
    # A histogram made of counters: Triton's histogram takes one observation per call, a counter takes the sum of a
    # batch.
    "tailor_confidence_bucket": "Images answered, by the probability of their most probable class, cumulative over le",
    "tailor_confidence_sum": "Sum of the probabilities of the most probable classes",
    "tailor_confidence_count": "Images answered, the count of the confidence histogram",
    "tailor_unknown_total": "Images answered with `unknown`, by result: unknown (resembles no class) or known",
    "tailor_unknown_kept_total": "Unknown images that were kept as files",
    "tailor_unknown_lost_total": "Unknown images that were to be kept and were not: queue (too many at once), size or disk",
    "tailor_access_log_lost_total": "Lines that the access log could not write",
    "tailor_logit_log_total": "Images whose logits were logged",
    "tailor_logit_log_lost_total": "Images whose logits were to be logged and were not: queue (too many at once) or disk",
}


class Metrics:
    """The counters of one instance of a version. Use from one thread; `close` passes the last counts to Triton.

    classes: the class names. groups: the shot group of each class. ranks: the rank of each class by training frequency,
    0 is the most frequent.
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
        self.metrics, self.counts = {}, Counter()
        self.lock, self.flushing = threading.RLock(), threading.Lock()
        # Create the counters with 0: Prometheus computes a rate for the first event only if the counter existed before.
        for prior in ("balanced", "train", "live", "number", "own"):
            self.count("tailor_images_total", 0, prior=prior)
        for result in ("unknown", "known"):
            self.count("tailor_unknown_total", 0, result=result)
        for name in ("tailor_failed_total", "tailor_access_log_lost_total", "tailor_unknown_kept_total"):
            self.count(name, 0)
        for reason in ("queue", "disk"):
            self.count("tailor_logit_log_lost_total", 0, reason=reason)
        for reason in ("queue", "size", "disk"):
            self.count("tailor_unknown_lost_total", 0, reason=reason)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._flush_often, name="metrics", daemon=True)
        self.thread.start()

    def count_images(self, priors, best, confidence):
        """Count classified images. priors: number by kind of prior. best: class indexes [n]. confidence: [n] in 0..1."""
        edges = np.searchsorted(CONFIDENCE_EDGES, confidence, side="left")
        with self.lock:
            for prior, count in priors.items():
                self.count("tailor_images_total", count, prior=prior)
            for index in best:
                self.count("tailor_top_class_total", 1, **self.class_labels[index])
            for index, edge in enumerate(CONFIDENCE_EDGES):
                self.count("tailor_confidence_bucket", int((edges <= index).sum()), le=f"{edge:.1f}")
            self.count("tailor_confidence_bucket", len(confidence), le="+Inf")
            self.count("tailor_confidence_sum", float(confidence.sum()))
            self.count("tailor_confidence_count", len(confidence))

    def count_unknown(self, images, unknown):
        """Count answers with `unknown`. images: all of them. unknown: those that resemble no class."""
        self.count("tailor_unknown_total", unknown, result="unknown")
        self.count("tailor_unknown_total", images - unknown, result="known")

    def count(self, family, number=1, **labels):
        """Add to a counter of FAMILIES."""
        with self.lock:
            self.counts[family, tuple(labels.items())] += number

    def flush(self):
        """Pass the changes since the last flush to Triton."""
        with self.flushing:
            with self.lock:
                counts, self.counts = self.counts, Counter()
            for key, count in counts.items():
                if key not in self.metrics:
                    name, labels = key
                    self.metrics[key] = self.families[name].Metric(labels=dict(labels) | {"version": self.version})
                self.metrics[key].increment(count)

    def close(self):
        """Stop the thread and pass the last counts to Triton."""
        self.closed.set()
        self.thread.join()
        self.flush()

    def _flush_often(self):
        while not self.closed.wait(FLUSH_EVERY):
            self.flush()


def class_labels(classes, ranks):
    """The label of each class: its name; with more than MAX_CLASS_LABELS classes `rank a-b`, its range of ranks."""
    if len(classes) <= MAX_CLASS_LABELS:
        return list(classes)
    edges = np.linspace(0, len(classes), MAX_CLASS_LABELS + 1).astype(int)
    bins = np.searchsorted(edges, np.asarray(ranks), side="right")
    return [f"rank {edges[i - 1] + 1}-{edges[i]}" for i in bins]
