"""`classifier` for Triton's python backend: encoded images in, the best classes for the asked target prior out.

Runs inside Triton's stub process with numpy and Pillow, and with the files beside it: prior.py and preprocess.py, the
copies of what training uses, metrics.py, live_prior.py and the logs. The network itself runs in `student` of the same version.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

# Pixels that the images of one request may have together: a solid image of 50 megapixels is a file of a few kilobytes
# and half a second's work, and a batch of them would keep every other caller waiting.
MAX_REQUEST_PIXELS = 200_000_000


class Refused(Exception):
    """A request asks for what cannot be done; the message names the input, `reason` is the kind of fault in one word."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class StudentFailed(Exception):
    """`student` did not answer."""


class Asked:
    """What one request asks: images uint8 [n,3,S,S], log prior [C] or [n,C] and its strength [n,1] or a number."""

    def __init__(self, images, log_prior, strength, priors):
        self.images, self.log_prior, self.strength = images, log_prior, strength
        self.priors = priors  # how many rows by kind of prior


class TritonPythonModel:
    """Triton calls initialize once, execute per batch."""

    def initialize(self, args):
        """Read the manifest of this version and load the arithmetic that it shares with training."""
        folder = Path(args["model_repository"]) / args["model_version"]
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.prior, self.preprocess = sibling("prior"), sibling("preprocess")
        self.version = int(args["model_version"])
        self.names = np.array([name.encode() for name in manifest["classes"]], dtype=np.object_)
        self.log_prior = np.asarray(manifest["log_prior"], dtype=np.float64)
        self.size, self.resize_to = manifest["image"]["size"], manifest["image"]["resize_to"]
        live_prior = sibling("live_prior")
        self.live_prior = live_prior.LivePrior(folder.parents[1], manifest["classes"], self.prior)
        self.no_live_prior = live_prior.NoLivePrior
        self.strength, self.top_k = float(manifest["strength"]), manifest["top_k"]
        self.max_batch_size = json.loads(args["model_config"])["max_batch_size"]
        groups = [self.prior.shot_group(count) for count in manifest["counts"]]
        ranks = np.argsort(np.argsort(-np.asarray(manifest["counts"]), kind="stable"), kind="stable")
        self.metrics = sibling("metrics").Metrics(self.version, manifest["classes"], groups, ranks)
        self.access_log = sibling("access_log").open_access_log(args, self.metrics.access_log_lost)
        self.logit_log = sibling("logit_log").open_logit_log(args, manifest, self.read_images, self.metrics)
        start = sibling("start")
        start.decode_each_format(self.preprocess, self.size, self.resize_to)
        start.take_up()

    def execute(self, requests):
        """Answer a batch from one pass of the student; a request with a bad row fails alone."""
        started = time.monotonic()
        responses, outcomes = [None] * len(requests), ["ok"] * len(requests)
        asked = {}
        for place, request in enumerate(requests):
            try:
                asked[place] = self.read(request)
            except Refused as refused:
                responses[place] = failure(str(refused), pb_utils.TritonError.INVALID_ARG)
                outcomes[place] = refused.reason
                self.metrics.refused(refused.reason)
        if asked:
            try:
                answers = self.answers(asked)
            except StudentFailed as failed:
                answers = {place: failure(str(failed), pb_utils.TritonError.INTERNAL) for place in asked}
                self.metrics.failed(len(asked))
                outcomes = ["student" if place in asked else outcome for place, outcome in enumerate(outcomes)]
            for place, answer in answers.items():
                responses[place] = answer
        if self.access_log.handler:
            for place, request in enumerate(requests):
                self.log(request, started, asked.get(place), outcomes[place])
        return responses

    def finalize(self):
        """Hand over the last counts and close the logs."""
        if self.logit_log:
            self.logit_log.close()
        self.metrics.close()
        self.access_log.close()

    def read(self, request):
        """What a request asks, as `Asked`. Raises Refused naming the input, and the row where the request has several."""
        encoded = read_input(request, "image", (1,))
        if encoded is None:
            raise Refused("image_missing", "image is missing; send one encoded image a row")
        encoded, rows = encoded[:, 0], len(encoded)
        strength = read_input(request, "strength", (1,), rows)
        target = read_input(request, "target_prior", None, rows)
        names = read_input(request, "prior", (1,), rows)
        if target is not None and strength is not None:
            raise Refused("both", "strength and target_prior exclude each other; send one of them")
        if names is not None:
            if target is not None or strength is not None:
                raise Refused("both", "prior excludes strength and target_prior; send one of them")
            named_priors = [self.read_name(name, row, rows) for row, name in enumerate(names[:, 0])]
            kinds = Counter(name.decode() for name in names[:, 0])
            return Asked(self.read_images(encoded), np.stack(named_priors), 1.0, kinds)
        if target is not None:
            # The small inputs first: a request that is refused for them costs no decoding.
            checked = [self.read_prior(p, row, rows) for row, p in enumerate(target)]
            return Asked(
                self.read_images(encoded), self.prior.log_target_prior(np.stack(checked)), 1.0, Counter(own=rows)
            )
        if strength is None:
            return Asked(
                self.read_images(encoded), self.log_prior, self.strength, Counter({kind_of(self.strength): rows})
            )
        strength = strength.astype(np.float64)
        for row, value in enumerate(strength[:, 0]):
            if not np.isfinite(value):
                raise Refused("strength", f"{named(row, rows)}strength is {value:g}; expected a finite number")
        return Asked(self.read_images(encoded), self.log_prior, strength, Counter(map(kind_of, strength[:, 0])))

    def read_images(self, encoded):
        """uint8 [n,3,S,S] of a request's encoded images. Raises Refused."""
        images, pixels = [], 0
        for row, data in enumerate(encoded):
            try:
                image = self.preprocess.decode(data)
                pixels += image.width * image.height
                if pixels > MAX_REQUEST_PIXELS:
                    raise Refused(
                        "request_pixels",
                        f"{named(row, len(encoded))}image brings the request to {pixels} pixels, "
                        f"above the limit of {MAX_REQUEST_PIXELS}; send fewer images at once",
                    )
                images.append(self.preprocess.resize(image, self.size, self.resize_to))
            except self.preprocess.ImageError as error:
                raise Refused(f"image_{error.kind}", f"{named(row, len(encoded))}image {error}") from None
            except MemoryError:
                raise Refused(
                    "image_memory",
                    f"{named(row, len(encoded))}image needs more memory than there is; send a smaller one",
                ) from None
        return np.stack(images)

    def read_prior(self, prior, row, rows):
        """A row of target_prior, checked. Raises Refused."""
        try:
            return self.prior.check_target_prior(prior, len(self.names))
        except ValueError as error:
            raise Refused("target_prior", f"{named(row, rows)}{error}") from None

    def read_name(self, name, row, rows):
        """What a row of prior adds to the logits, float64 [C]. Raises Refused."""
        if name in (b"balanced", b"train"):
            return self.log_prior * (name == b"train")
        if name != b"live":
            shown = ascii(name[:40].decode(errors="replace"))
            raise Refused("prior", f"{named(row, rows)}prior is {shown}; expected balanced, train or live")
        try:
            return self.live_prior.log()
        except self.no_live_prior as error:
            raise Refused("live_prior", f"{named(row, rows)}prior is live, but {error}") from None

    def answers(self, asked):
        """The responses by place of all requests that could be read, counted. Raises StudentFailed."""
        images = np.concatenate([one.images for one in asked.values()])
        logits = self.balanced_logits(images)
        if self.logit_log:
            self.logit_log.offer(images, logits)
        answers, tops, confidences, start = {}, [], [], 0
        for place, one in asked.items():
            rows = logits[start : start + len(one.images)]
            start += len(one.images)
            best, probability = self.best(rows, one.log_prior, one.strength)
            answers[place] = pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor("class", self.names[best]),
                    pb_utils.Tensor("index", best.astype(np.int32)),
                    pb_utils.Tensor("probability", probability.astype(np.float32)),
                ]
            )
            tops.append(best[:, 0])
            confidences.append(probability[:, 0])
        priors = sum((one.priors for one in asked.values()), Counter())
        self.metrics.answered(priors, np.concatenate(tops), np.concatenate(confidences))
        return answers

    def balanced_logits(self, images):
        """The student's logits at strength 0, float64 [n,C], asked of its same version in pieces it takes.

        The adjustment is added here in float64 instead of by the student in float32, so that every finite strength has
        a finite answer and a target prior takes the same path. Raises StudentFailed.
        """
        pieces = []
        for start in range(0, len(images), self.max_batch_size):
            piece = images[start : start + self.max_batch_size]
            response = pb_utils.InferenceRequest(
                model_name="student",
                model_version=self.version,
                requested_output_names=["logits"],
                inputs=[
                    pb_utils.Tensor("image", piece),
                    pb_utils.Tensor("strength", np.zeros((len(piece), 1), dtype=np.float32)),
                ],
                # Without it a student on a GPU may answer in device memory, which has no numpy view.
                preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
            ).exec()
            if response.has_error():
                raise StudentFailed(f"student {self.version} failed: {response.error().message()}")
            pieces.append(pb_utils.get_output_tensor_by_name(response, "logits").as_numpy().astype(np.float64))
        logits = np.concatenate(pieces)
        if not np.isfinite(logits).all():
            raise StudentFailed(f"student {self.version} answered logits that are not finite; export a sound student")
        return logits

    def best(self, logits, log_prior, strength):
        """Index and probability, [n,K] each, of the best top_k classes of each row, by its adjusted logits."""
        adjusted = self.prior.adjust_logits(logits, log_prior, strength)
        best = np.argsort(-adjusted, axis=-1, kind="stable")[:, : self.top_k]
        return best, np.take_along_axis(self.prior.softmax(adjusted), best, axis=-1)

    def log(self, request, started, asked, outcome):
        """A line of the access log; of a request that was refused only its size is known."""
        image = pb_utils.get_input_tensor_by_name(request, "image")
        encoded = [] if image is None else image.as_numpy().reshape(-1)
        prior = None if asked is None else asked.priors.most_common(1)[0][0] if len(asked.priors) == 1 else "mixed"
        size = sum(len(data) for data in encoded)
        self.access_log.write(request.request_id(), started, len(encoded), size, prior, outcome)


def read_input(request, name, shape, rows=None):
    """An input's array [rows, *shape], or None when it is absent. Raises Refused for an array of another shape.

    Triton checks the shapes too, but its product of huge sides overflows and lets some pass; and where an input is
    optional it does not count whether a required one is there.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    array = tensor.as_numpy()
    wrong = array.ndim < 2 or not len(array) or (shape is not None and array.shape[1:] != shape)
    if wrong or (rows is not None and len(array) != rows):
        count = "n" if rows is None else rows
        expected = f"[{count}, {', '.join(map(str, shape or ['classes']))}]"
        raise Refused(f"{name}_shape", f"{name} has shape {list(array.shape)}; expected {expected}")
    return array


def named(row, rows):
    """Which row a message is about; nothing where there is only one."""
    return f"row {row}: " if rows > 1 else ""


def kind_of(strength):
    """What the metrics call a strength: balanced, train or number."""
    return {0.0: "balanced", 1.0: "train"}.get(float(strength), "number")


def failure(message, code):
    """A response that fails one request."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def sibling(name):
    """Load the module in the file beside this one; by path, as by name a package in site-packages could come first."""
    spec = importlib.util.spec_from_file_location(f"tailor_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
