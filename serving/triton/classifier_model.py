"""`classifier` for Triton's python backend: encoded images in, the best classes for the asked target prior out.

Runs inside Triton's stub process with numpy and Pillow, and with prior.py and preprocess.py, the copies beside it of
the files that training uses. The network itself runs in `student` of the same version.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class Refused(Exception):
    """A request asks for what cannot be done; the message names the input."""


class StudentFailed(Exception):
    """`student` did not answer."""


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
        self.strength, self.top_k = float(manifest["strength"]), manifest["top_k"]
        self.max_batch_size = json.loads(args["model_config"])["max_batch_size"]

    def execute(self, requests):
        """Answer a batch from one pass of the student; a request with a bad row fails alone."""
        responses = [None] * len(requests)
        asked = {}
        for place, request in enumerate(requests):
            try:
                asked[place] = self.read(request)
            except Refused as refused:
                responses[place] = failure(str(refused), pb_utils.TritonError.INVALID_ARG)
        if not asked:
            return responses
        try:
            logits = self.balanced_logits(np.concatenate([images for images, _, _ in asked.values()]))
        except StudentFailed as failed:
            for place in asked:
                responses[place] = failure(str(failed), pb_utils.TritonError.INTERNAL)
            return responses
        start = 0
        for place, (images, log_prior, strength) in asked.items():
            rows = logits[start : start + len(images)]
            start += len(images)
            responses[place] = self.answer(rows, log_prior, strength)
        return responses

    def read(self, request):
        """The rows of one request: images uint8 [n,3,S,S], log prior [C] or [n,C], and its strength [n,1] or a number.

        Raises Refused naming the input, and the row where the request has several.
        """
        encoded = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()[:, 0]
        strength = pb_utils.get_input_tensor_by_name(request, "strength")
        target = pb_utils.get_input_tensor_by_name(request, "target_prior")
        if target is not None and strength is not None:
            raise Refused("strength and target_prior exclude each other; send one of them")
        images = np.stack([self.read_image(data, row, len(encoded)) for row, data in enumerate(encoded)])
        if target is not None:
            rows = [self.read_prior(p, row, len(encoded)) for row, p in enumerate(target.as_numpy())]
            return images, self.prior.log_target_prior(np.stack(rows)), 1.0
        if strength is None:
            return images, self.log_prior, self.strength
        strength = strength.as_numpy().astype(np.float64)
        for row, value in enumerate(strength[:, 0]):
            if not np.isfinite(value):
                raise Refused(f"{named(row, len(encoded))}strength is {value:g}; expected a finite number")
        return images, self.log_prior, strength

    def read_image(self, data, row, rows):
        try:
            return self.preprocess.preprocess(data, self.size, self.resize_to)
        except self.preprocess.ImageError as error:
            raise Refused(f"{named(row, rows)}image {error}") from None
        except MemoryError:
            raise Refused(f"{named(row, rows)}image needs more memory than there is; send a smaller one") from None

    def read_prior(self, prior, row, rows):
        try:
            return self.prior.check_target_prior(prior, len(self.names))
        except ValueError as error:
            raise Refused(f"{named(row, rows)}{error}") from None

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

    def answer(self, logits, log_prior, strength):
        """The response of one request: the best top_k classes of each row, by its adjusted logits."""
        adjusted = self.prior.adjust_logits(logits, log_prior, strength)
        best = np.argsort(-adjusted, axis=-1, kind="stable")[:, : self.top_k]
        probability = np.take_along_axis(self.prior.softmax(adjusted), best, axis=-1)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("class", self.names[best]),
                pb_utils.Tensor("index", best.astype(np.int32)),
                pb_utils.Tensor("probability", probability.astype(np.float32)),
            ]
        )


def named(row, rows):
    """Which row a message is about; nothing where there is only one."""
    return f"row {row}: " if rows > 1 else ""


def failure(message, code):
    """A response that fails one request."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def sibling(name):
    """Load the module in the file beside this one; by path, as by name a package in site-packages could come first."""
    spec = importlib.util.spec_from_file_location(f"tailor_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
