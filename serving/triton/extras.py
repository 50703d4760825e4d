"""Extra parts of an answer that a request or the release wants: set, decision, unknown image, node of a taxonomy, reasons.

Runs in the inference process, with numpy. decisions.py, a copy of the module of `models`, has the arithmetic. The response to
a request without extras has no further outputs. Each output costs about 5 µs here and 6 µs in the server, so a request can get
all parts as one JSON text, the output `extras`.
"""

from __future__ import annotations

import json
from itertools import accumulate
from typing import NamedTuple

import numpy as np

COSTS_BYTES = 16 * 1024 * 1024  # of the text of one cost matrix
CACHED = 256  # thresholds, one for each coverage and prior, and defaults by outputs of a request, that are kept
CACHED_COSTS = COSTS_BYTES  # bytes of all texts of costs that are kept with their numbers
PACKED = "extras"  # output with all parts of a row as JSON
SETS, NODES = ("set", "set_size"), ("node", "node_probability")
DECISION, UNKNOWN = ("decision", "decision_index", "expected_cost"), ("unknown", "typicality")
SEPARATE = frozenset((*SETS, *NODES, *DECISION, *UNKNOWN))
# Inputs and outputs of each part, by the method of Extras that computes it.
KINDS = {
    "sets": (("coverage",), SETS),
    "decision": (("costs", "ask"), DECISION),
    "unknown": (("false_alarms",), UNKNOWN),
    "nodes": (("level",), NODES),
}
TYPES = {"decision_index": np.int32, "unknown": np.bool_} | dict.fromkeys(
    ("expected_cost", "typicality", "node_probability"), np.float32
)  # of the outputs that are not text


class Wanted(NamedTuple):
    """The extras of a request, a value for each row; None without that part."""

    coverage: list | None
    costs: list | None  # arrays [C] or [C,C], or None for 1 for every wrong class
    ask: list | None
    false_alarms: list | None
    level: list | None
    explain: list | None = None  # numbers of nearest training images; explain.py computes the outputs
    packed: bool = False  # whether the response has PACKED instead of an output for each value
    kinds: tuple = ()  # methods of Extras that compute the parts


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
        self.parser, self.prior, self.decisions, self.names = parser, prior, decisions, names
        self.texts = np.array([name.decode() for name in names], dtype=np.object_)
        sets, defaults = manifest.get("sets"), manifest.get("decision") or {}
        self.thresholds = decisions.SetThresholds(sets["scores"], sets["interpolation"]) if sets else None
        costs = defaults.get("costs")
        self.cache, self.costs_cache, self.costs_bytes, self.defaults_cache = {}, {}, 0, {}
        tree = manifest.get("taxonomy")
        self.taxonomy = taxonomy.Taxonomy(tree["names"], tree["parents"], len(names)) if tree else None
        self.defaults = {
            "coverage": (sets or {}).get("coverage"),
            "costs": None if costs is None else decisions.check_costs(costs, len(names)),
            "ask": defaults.get("ask"),
            "false_alarms": (unknown or {}).get("false_alarms"),
            "level": (tree or {}).get("level"),
            "explain": None,
        }
        self.has_defaults = any(value is not None for value in self.defaults.values())
        self.checks = {
            "coverage": self.check_coverage, "costs": self.cached_costs, "ask": self.check_ask,
            "level": self.check_level, "false_alarms": self.check_false_alarms, "explain": self.check_explain,
        }  # fmt: skip
        nodes = tree["names"] if tree else []
        self.quoted = {text: json.dumps(text) for text in ("", *self.texts, *nodes)}

    def parse(self, request, rows):
        """The extras of a request, or None if it has none. Raises BadRequest naming the input."""
        parser, sent = self.parser, {}
        for name, check in self.checks.items():
            array = parser.read_input(request, name, (1,), rows)
            if array is not None and (name != "explain" or array.any()):
                sent[name] = parser.parse_rows(check, array[:, 0])
        if not sent and not self.has_defaults:
            return None
        outputs = frozenset(request.requested_output_names())
        if sent:
            return self.wanted(sent, rows, outputs)
        key = rows, outputs
        if key not in self.defaults_cache:
            if len(self.defaults_cache) >= CACHED:
                self.defaults_cache.clear()
            self.defaults_cache[key] = self.wanted({}, rows, outputs)
        return self.defaults_cache[key]

    def wanted(self, sent, rows, outputs):
        """The Wanted of a request. sent: values by input. outputs: that it lists; all of the model if it lists none.

        A part is computed if one of its outputs is listed; `unknown` in any case, because a metric counts it.
        """
        values = {name: None if value is None else [value] * rows for name, value in self.defaults.items()} | sent
        packed = PACKED in outputs and SEPARATE.isdisjoint(outputs)
        kinds = tuple(
            kind
            for kind, (inputs, names) in KINDS.items()
            if any(values[name] is not None for name in inputs)
            and (packed or kind == "unknown" or not outputs.isdisjoint(names))
        )
        return Wanted(**values, packed=packed, kinds=kinds)

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

    def parts(self, requests, logits, probability, order):
        """The parts of each row of a batch, a mapping from output to its value; each is computed once for all its rows.

        requests: parsed. logits: calibrated and balanced, [n,C], the rows of all requests. probability: under the prior of
        each row, [n,C]. order: of the classes by probability, [n,C].
        """
        parts, alike, end = [{} for _ in logits], {}, 0
        for request in requests:
            start, end = end, end + len(request.images)
            if request.extras is not None:
                members, rows = alike.setdefault(request.extras.kinds, ([], []))
                members.append(request)
                rows.extend(range(start, end))
        for kinds, (members, rows) in alike.items():  # usually all requests want the same
            chosen = slice(None) if len(rows) == len(parts) else rows
            columns = {}
            for kind in kinds:
                columns |= getattr(self, kind)(members, logits[chosen], probability[chosen], order[chosen])
            for row, *values in zip(rows, *columns.values(), strict=True):
                parts[row] = dict(zip(columns, values, strict=True))
        return parts

    def arrays(self, extras, parts):
        """The output arrays by name of one request. extras: Wanted or None. parts: of its rows."""
        if extras is None or not parts[0]:
            return {}
        if extras.packed:
            return {PACKED: np.array([[self.packed(row)] for row in parts], dtype=np.object_)}
        arrays = {}
        for name in parts[0]:
            values = [row[name] for row in parts]
            if name == "set":  # filled up with empty texts to the largest set of the request
                width = max(map(len, values))
                padded = [[text.encode() for text in row] + [b""] * (width - len(row)) for row in values]
                arrays["set"] = np.array(padded, dtype=np.object_)
                arrays["set_size"] = np.array([[len(row)] for row in values], dtype=np.int32)
            elif name in TYPES:
                arrays[name] = np.array(values, dtype=TYPES[name])[:, None]
            else:
                arrays[name] = np.array([[text.encode()] for text in values], dtype=np.object_)
        return arrays

    def packed(self, row):
        """The parts of a row as JSON. Nine digits are those of a float32; json.dumps takes three times as long."""
        fields = []
        if "set" in row:
            fields.append(f'"set": [{", ".join([self.quoted[name] for name in row["set"]])}]')
        if "decision" in row:
            fields.append(f'"decision": {self.quoted[row["decision"]]}, "decision_index": {row["decision_index"]}')
            fields.append(f'"expected_cost": {row["expected_cost"]:.9g}')
        if "unknown" in row:
            unknown = "true" if row["unknown"] else "false"
            fields.append(f'"unknown": {unknown}, "typicality": {row["typicality"]:.9g}')
        if "node" in row:
            fields.append(f'"node": {self.quoted[row["node"]]}, "node_probability": {row["node_probability"]:.9g}')
        return ("{" + ", ".join(fields) + "}").encode()

    def nodes(self, requests, _logits, probability, _order):
        """`node`: name of the deepest node that reaches the level, empty for none; and its `node_probability`."""
        answers = self.taxonomy.answers(probability, np.array(values_of(requests, "level")))
        sums = np.array([answer.probability for answer in answers], dtype=np.float32)
        names = [self.taxonomy.names[answer.node] if answer.node >= 0 else "" for answer in answers]
        return {"node": names, "node_probability": sums.tolist()}

    def sets(self, requests, logits, probability, order):
        """`set`: class names, most probable first."""
        rows = [row for request in requests for row in self.thresholds_of(request)]
        # Requests usually have the same coverage and prior, and then the same array.
        thresholds = rows[0] if all(row is rows[0] for row in rows) else np.stack(rows)
        inside, _ = self.decisions.members_of(self.prior.softmax(logits), probability, thresholds, order)
        members = inside[np.arange(len(order))[:, None], order]
        names, sizes = self.texts[order[members]].tolist(), members.sum(axis=1).tolist()
        return {"set": [names[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]}

    def thresholds_of(self, request):
        """The thresholds [C] of each row of a request; they are computed once for a coverage and a prior."""
        own_prior = request.log_prior.ndim > 1
        for row, (coverage, [strength]) in enumerate(
            zip(request.extras.coverage, request.strength.tolist(), strict=True)
        ):
            log_prior = request.log_prior[row] if own_prior else request.log_prior
            key = coverage, strength, log_prior.tobytes() if own_prior else None
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
        matrices = {id(each): each for each in costs}  # usually one: of the release, or of equal texts
        for matrix in matrices.values():
            rows = slice(None) if len(matrices) == 1 else np.array([each is matrix for each in costs])
            index[rows], cost[rows] = self.decisions.cheapest(probability[rows], matrix, ask[rows])
        indexes = index.tolist()
        names = ["" if each < 0 else self.texts[each] for each in indexes]
        return {"decision": names, "decision_index": indexes, "expected_cost": cost.tolist()}

    def unknown(self, requests, logits, _probability, _order):
        """`typicality`: share of known validation images that look at most as familiar; `unknown`: at most false_alarms."""
        density = self.decisions.familiarity(logits, self.log_prior)
        share = self.typicality(density, logits.argmax(axis=1))
        unknown = share <= np.array(values_of(requests, "false_alarms")) + 1e-12
        return {"unknown": unknown.tolist(), "typicality": share.astype(np.float32).tolist()}


def values_of(requests, name):
    """The values of one extra for each row of the requests; None for the rows of a request without it."""
    values = []
    for request in requests:
        values += getattr(request.extras, name) or [None] * len(request.images)
    return values
