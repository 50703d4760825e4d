"""Extra parts of an answer that a request or the release wants: set, decision, unknown image, node of a taxonomy, reasons.

Runs in the inference process, with numpy. decisions.py, a copy of the module of `models`, has the arithmetic. A request
without extras costs nothing more, and its response has no further outputs.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

COSTS_BYTES = 16 * 1024 * 1024  # of the text of one cost matrix
CACHED = 256  # thresholds that are kept, one for each coverage and prior
CACHED_COSTS = COSTS_BYTES  # bytes of all texts of costs that are kept with their numbers


class Wanted(NamedTuple):
    """The extras of a request, a value for each row; None without that part."""

    coverage: list | None
    costs: list | None  # arrays [C] or [C,C], or None for 1 for every wrong class
    ask: list | None
    false_alarms: list | None
    level: list | None
    explain: list | None = None  # numbers of nearest training images; explain.py computes the outputs


class Extras:
    """Parses the inputs `coverage`, `costs`, `ask`, `false_alarms`, `level` and `explain`, and computes outputs of all but the
    last.

    manifest: of the version, a mapping. names: class names as bytes, by index. parser: the module request_parser. prior,
    decisions, taxonomy: the modules of these names in `models`, or their copies. most_nearest: largest `explain`; 0 for a
    release without reasons.
    """

    def __init__(self, manifest, names, parser, prior, decisions, taxonomy, most_nearest=0):
        self.most_nearest = most_nearest
        self.log_prior = np.asarray(manifest["log_prior"], dtype=np.float64)
        groups, unknown = [prior.shot_group(count) for count in manifest["counts"]], manifest.get("unknown")
        self.typicality = decisions.Typicality(unknown["scores"], groups) if unknown else None
        self.false_alarms = (unknown or {}).get("false_alarms")
        self.parser, self.prior, self.decisions, self.names = parser, prior, decisions, names
        sets, defaults = manifest.get("sets"), manifest.get("decision") or {}
        self.thresholds = decisions.SetThresholds(sets["scores"], sets["interpolation"]) if sets else None
        self.coverage, self.ask = (sets or {}).get("coverage"), defaults.get("ask")
        costs = defaults.get("costs")
        self.costs = None if costs is None else decisions.check_costs(costs, len(names))
        self.cache, self.costs_cache, self.costs_bytes = {}, {}, 0
        tree = manifest.get("taxonomy")
        self.taxonomy = taxonomy.Taxonomy(tree["names"], tree["parents"], len(names)) if tree else None
        self.level = (tree or {}).get("level")

    def parse(self, request, rows):
        """The extras of a request, or None if it has none. Raises BadRequest naming the input."""
        read, parse_rows = self.parser.read_input, self.parser.parse_rows
        names = ("coverage", "costs", "ask", "level")
        coverage, costs, ask, level = (read(request, name, (1,), rows) for name in names)
        if coverage is not None:
            coverage = parse_rows(self.check_coverage, coverage[:, 0])
        elif self.coverage is not None:
            coverage = [self.coverage] * rows
        if costs is not None:
            costs = parse_rows(self.cached_costs, costs[:, 0])
        elif self.costs is not None:
            costs = [self.costs] * rows
        if ask is not None:
            ask = parse_rows(self.check_ask, ask[:, 0])
        elif self.ask is not None:
            ask = [self.ask] * rows
        if level is not None:
            level = parse_rows(self.check_level, level[:, 0])
        elif self.level is not None:
            level = [self.level] * rows
        rate = read(request, "false_alarms", (1,), rows)
        if rate is not None:
            rate = parse_rows(self.check_false_alarms, rate[:, 0])
        elif self.false_alarms is not None:
            rate = [self.false_alarms] * rows
        explain = read(request, "explain", (1,), rows)
        if explain is not None:
            explain = parse_rows(self.check_explain, explain[:, 0]) if explain.any() else None
        wanted = Wanted(coverage, costs, ask, rate, level, explain)
        return None if all(part is None for part in wanted) else wanted

    def check_coverage(self, value):
        """A row of the input `coverage`. Raises BadRequest."""
        number = float(str(value))  # the shortest decimal of a float32: 0.99 and not 0.990000009...
        if not 0 < number < 1:
            raise self.bad("coverage", f"coverage is {value:g}; expected a number above 0 and below 1")
        if self.thresholds is None:
            raise self.bad(
                "coverage", "coverage: this release has no prediction sets; train with at least 30 validation images"
            )
        images = self.thresholds.images
        if number > (largest := self.decisions.largest_coverage(images)) + 1e-9:
            raise self.bad(
                "coverage",
                f"coverage is {number:g}; the {images} validation images of this release support at most {largest:.4g}, "
                f"{number:g} needs {self.decisions.images_needed(number)}",
            )
        return number

    def cached_costs(self, text):
        """Costs as `read_costs`; a caller usually sends the same text with each row and request."""
        if text not in self.costs_cache:
            costs = self.read_costs(text)
            if self.costs_bytes + len(text) > CACHED_COSTS:
                self.costs_cache, self.costs_bytes = {}, 0
            self.costs_cache[text] = costs
            self.costs_bytes += len(text)
        return self.costs_cache[text]

    def read_costs(self, text):
        """Costs [C] or [C,C] from a row of the input `costs`, a JSON list. Raises BadRequest."""
        classes = len(self.names)
        limit = min(self.parser.NUMBER_BYTES * (classes * classes + 2), COSTS_BYTES)
        if len(text) > limit:
            raise self.bad("costs", f"costs has {len(text)} bytes; expected at most {limit}")
        try:
            numbers = self.prior.check_numbers(json.loads(text))
        except (ValueError, TypeError, OverflowError, RecursionError):
            expected = f"expected {classes} numbers, one per class, or {classes} lists of {classes}"
            raise self.bad(
                "costs", f"costs is {self.parser.shortened(text)}, no lists of numbers; {expected}"
            ) from None
        try:
            return self.decisions.check_costs(numbers, classes)
        except ValueError as error:
            raise self.bad("costs", str(error)) from None

    def check_ask(self, value):
        """A row of the input `ask`. Raises BadRequest."""
        if not (np.isfinite(value) and value >= 0):
            raise self.bad("ask", f"ask is {value:g}; expected a finite price of at least 0")
        return float(str(value))

    def check_false_alarms(self, value):
        """A row of the input `false_alarms`. Raises BadRequest."""
        number = float(str(value))
        if not 0 < number < 1:
            raise self.bad("false_alarms", f"false_alarms is {value:g}; expected a number above 0 and below 1")
        if self.typicality is None:
            raise self.bad(
                "false_alarms",
                "false_alarms: this release cannot detect unknown images; train with at least 30 validation images",
            )
        return number

    def check_level(self, value):
        """A row of the input `level`. Raises BadRequest."""
        number = float(str(value))
        if not 0 < number <= 1:
            raise self.bad("level", f"level is {value:g}; expected a number above 0 and at most 1")
        if self.taxonomy is None:
            raise self.bad("level", "level: this release has no taxonomy; set data.taxonomy and export again")
        return number

    def check_explain(self, value):
        """A row of the input `explain`. Raises BadRequest."""
        if not self.most_nearest:
            raise self.bad("explain", "explain: this release has no reasons; set serving.explain and export again")
        if not 0 <= value <= self.most_nearest:
            raise self.bad("explain", f"explain is {value:g}; expected a number from 0 to {self.most_nearest}")
        return int(value)

    def bad(self, reason, message):
        """A BadRequest to raise."""
        return self.parser.BadRequest(reason, message)

    def outputs(self, requests, logits, probability, order):
        """The output arrays by name of each request of a batch, in order; each part is computed once for all its rows.

        requests: parsed. logits: calibrated and balanced, [n,C], the rows of all requests. probability: under the prior of
        each row, [n,C]. order: of the classes by probability, [n,C].
        """
        outputs = [{} for _ in requests]
        if all(request.extras is None for request in requests):
            return outputs
        ends = np.cumsum([len(request.images) for request in requests])
        for wants, compute in (
            (lambda extras: extras.coverage is not None, self.sets),
            (lambda extras: extras.costs is not None or extras.ask is not None, self.decision),
            (lambda extras: extras.false_alarms is not None, self.unknown),
            (lambda extras: extras.level is not None, self.nodes),
        ):
            members = [i for i, request in enumerate(requests) if request.extras is not None and wants(request.extras)]
            if not members:
                continue
            counts = [len(requests[i].images) for i in members]
            rows = slice(None)
            if len(members) < len(requests):
                rows = np.concatenate([np.arange(ends[i] - n, ends[i]) for i, n in zip(members, counts, strict=True)])
            arrays = compute([requests[i] for i in members], logits[rows], probability[rows], order[rows])
            start = 0
            for i, count in zip(members, counts, strict=True):
                outputs[i] |= {name: values[start : start + count] for name, values in arrays.items()}
                start += count
        for arrays in outputs:
            if "set" in arrays:  # no wider than the largest set of the request
                arrays["set"] = np.ascontiguousarray(arrays["set"][:, : arrays["set_size"].max()])
        return outputs

    def nodes(self, requests, _logits, probability, _order):
        """`node`: name of the deepest node that reaches the level, empty for none; and its `node_probability`."""
        answers = self.taxonomy.answers(probability, np.array(values_of(requests, "level")))
        names = [self.taxonomy.names[answer.node].encode() if answer.node >= 0 else b"" for answer in answers]
        sums = np.array([answer.probability for answer in answers], dtype=np.float32)
        return {"node": np.array(names, dtype=np.object_)[:, None], "node_probability": sums[:, None]}

    def sets(self, requests, logits, probability, order):
        """`set`: class names, most probable first, filled up with empty texts; `set_size`: their number."""
        rows = [row for request in requests for row in self.thresholds_of(request)]
        # Requests usually have the same coverage and prior, and then the same array.
        thresholds = rows[0] if all(row is rows[0] for row in rows) else np.stack(rows)
        inside, _ = self.decisions.members_of(self.prior.softmax(logits), probability, thresholds, order)
        members = np.take_along_axis(inside, order, axis=1)
        sizes = members.sum(axis=1, dtype=np.int32)
        names = np.full((len(sizes), sizes.max()), b"", dtype=np.object_)
        names[np.arange(sizes.max()) < sizes[:, None]] = self.names[order[members]]
        return {"set": names, "set_size": sizes[:, None]}

    def thresholds_of(self, request):
        """The thresholds [C] of each row of a request; they are computed once for a coverage and a prior."""
        own_prior = request.log_prior.ndim > 1
        for row, (coverage, [strength]) in enumerate(zip(request.extras.coverage, request.strength, strict=True)):
            log_prior = request.log_prior[row] if own_prior else request.log_prior
            key = coverage, float(strength), log_prior.tobytes() if own_prior else None
            if key not in self.cache:
                if len(self.cache) >= CACHED:
                    self.cache.clear()
                prior = self.prior.softmax(self.prior.adjust_logits(np.zeros(len(log_prior)), log_prior, strength))
                self.cache[key] = self.thresholds.thresholds(coverage, prior)
            yield self.cache[key]

    def decision(self, requests, _logits, probability, _order):
        """`decision`: the class name of least expected cost, empty for a person; its index, -1; and the expected cost."""
        costs, ask = values_of(requests, "costs"), values_of(requests, "ask")
        ask = np.array([np.inf if price is None else price for price in ask])
        index, cost = np.zeros(len(ask), dtype=np.int32), np.zeros(len(ask), dtype=np.float32)
        for matrix in {id(each): each for each in costs}.values():  # usually one: of the release, or of equal texts
            rows = np.array([each is matrix for each in costs])
            index[rows], cost[rows] = self.decisions.cheapest(probability[rows], matrix, ask[rows])
        names = np.where(index < 0, b"", self.names[index]).astype(np.object_)
        return {"decision": names[:, None], "decision_index": index[:, None], "expected_cost": cost[:, None]}

    def unknown(self, requests, logits, _probability, _order):
        """`typicality`: share of known validation images that look at most as familiar; `unknown`: at most false_alarms."""
        density = self.decisions.familiarity(logits, self.log_prior)
        share = self.typicality(density, logits.argmax(axis=1))
        unknown = share <= np.array(values_of(requests, "false_alarms")) + 1e-12
        return {"unknown": unknown[:, None], "typicality": share.astype(np.float32)[:, None]}


def values_of(requests, name):
    """The values of one extra for each row of the requests; None for the rows of a request without it."""
    values = []
    for request in requests:
        values += getattr(request.extras, name) or [None] * len(request.images)
    return values
