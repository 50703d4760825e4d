"""`classifier` and `segmenter` for Triton's python backend: encoded images in, classes for the requested target prior out.

Runs in an inference process (Triton's stub) with numpy and Pillow and with the files beside it: prior.py,
preprocess.py, decisions.py and taxonomy.py (copies of the modules of training), request_parser.py, extras.py, explain.py,
metrics.py, live_prior.py, start.py and the logs. The network runs in `student` of the same version, or in
this process if the config's parameter `network` is `own`: running a small network takes less time than a request to `student`.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class StudentFailed(Exception):
    """`student`, or the graph in this process, failed or returned logits that are not finite."""


class TritonPythonModel:
    """The model. Triton calls initialize once, execute for each batch, finalize at the end."""

    def initialize(self, args):
        """Read the manifest of this version, check the graph, load the modules beside this file, open the logs.

        The load fails if the graph of `student` does not match the manifest, because the onnxruntime backend does not
        check it.
        """
        # resolve(), because Triton's repository may be a tree of links.
        folder = (Path(args["model_repository"]) / args["model_version"]).resolve()
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        graph = folder.parents[1] / "student" / args["model_version"] / "model.onnx"
        sibling("start").check_graph(graph, manifest)
        request_parser, live_prior = sibling("request_parser"), sibling("live_prior")
        preprocess, self.prior, self.bad_request = sibling("preprocess"), sibling("prior"), request_parser.BadRequest
        self.version, self.top_k = int(args["model_version"]), manifest["top_k"]
        self.temperature = (manifest.get("calibration") or {}).get("temperature", 1.0)
        self.names = np.array([name.encode() for name in manifest["classes"]], dtype=np.object_)
        live = live_prior.LivePrior(folder.parents[1], manifest["classes"], self.prior)
        siblings = sibling("decisions"), sibling("taxonomy")
        explain = sibling("explain")
        self.explanations = explain.open_explanations(folder, manifest, self.names, siblings[0].activation_maps)
        most = explain.MOST if self.explanations else 0
        self.extras = sibling("extras").Extras(manifest, self.names, request_parser, self.prior, *siblings, most)
        self.parser = request_parser.RequestParser(
            manifest, self.prior, preprocess, live, live_prior.NoLivePrior, self.extras
        )
        config = json.loads(args["model_config"])
        self.max_batch_size = config["max_batch_size"]
        self.segmenter = None
        self.network = self.own_network(graph, config)
        if canvas := manifest.get("segmentation"):
            self.segmenter = sibling("segmenter").Segmenter(self.names, self.top_k, self.outputs, self.max_batch_size)
        counts = manifest["counts"]
        groups = self.prior.pixel_groups(counts) if canvas else [self.prior.shot_group(count) for count in counts]
        ranks = np.argsort(np.argsort(-np.asarray(counts), kind="stable"), kind="stable")
        self.metrics = sibling("metrics").Metrics(self.version, manifest["classes"], groups, ranks)
        count_lost = partial(self.metrics.count, "tailor_access_log_lost_total")
        self.access_log = sibling("access_log").open_access_log(args, count_lost)
        self.logit_log = self.unknown_images = None
        if not canvas:
            files = sibling("folder_files")
            log = sibling("logit_log")
            self.logit_log = log.open_logit_log(args, manifest, self.parser.read_images, self.metrics, files)
            self.unknown_images = sibling("unknown_images").open_unknown_images(args, self.metrics, files)
        start = sibling("start")
        start.decode_each_format(preprocess, self.parser.size, self.parser.resize_to)
        start.apply_priority()

    def own_network(self, graph, config):
        """The graph of `student` of this version, loaded in this process; None if requests go to `student`."""
        if config["parameters"].get("network", {}).get("string_value") != "own":
            return None
        network = sibling("network").Network(graph, config)
        canvas = self.parser.canvas
        network.warm_up((3, canvas["height"], canvas["width"]) if canvas else (3, self.parser.size, self.parser.size))
        return network

    def execute(self, requests):
        """Process a batch of requests with one call of the network; a request with an invalid row fails alone."""
        started = time.monotonic()
        responses, outcomes = [None] * len(requests), ["ok"] * len(requests)
        parsed = {}
        for index, request in enumerate(requests):
            try:
                parsed[index] = self.parser.parse(request)
            except self.bad_request as error:
                responses[index] = error_response(str(error), pb_utils.TritonError.INVALID_ARG)
                outcomes[index] = error.reason
                self.metrics.count("tailor_refused_total", reason=error.reason)
        if parsed:
            try:
                results = self.segment(parsed, requests) if self.segmenter else self.classify(list(parsed.values()))
            except StudentFailed as error:
                results = [error_response(str(error), pb_utils.TritonError.INTERNAL) for _ in parsed]
                self.metrics.count("tailor_failed_total", len(parsed))
                outcomes = ["student" if index in parsed else outcome for index, outcome in enumerate(outcomes)]
            for index, response in zip(parsed, results, strict=True):
                responses[index] = response
        if self.access_log:
            for index, request in enumerate(requests):
                self.log(request, started, parsed.get(index), outcomes[index])
        return responses

    def finalize(self):
        """Close the logs and pass the last counts to Triton."""
        if self.logit_log:
            self.logit_log.close()
        if self.unknown_images:
            self.unknown_images.close()
        self.metrics.close()
        if self.access_log:
            self.access_log.close()

    def classify(self, parsed):
        """The responses to parsed requests, in order; counts their images. Raises StudentFailed."""
        images = np.concatenate([request.images for request in parsed])
        logits = self.balanced_logits(images)
        if self.logit_log:
            self.logit_log.offer(images, logits)
        calibrated = self.prior.calibrate_logits(logits, self.temperature)
        adjusted = self.adjusted_logits(calibrated, parsed)
        order = np.argsort(-adjusted, axis=-1, kind="stable")
        best = order[:, : self.top_k]
        every = self.prior.softmax(adjusted)
        probability = np.take_along_axis(every, best, axis=-1)
        outputs = {
            "class": self.names[best],
            "index": best.astype(np.int32),
            "probability": probability.astype(np.float32),
        }
        responses, priors, start = [], Counter(), 0
        parts = self.extras.parts(parsed, calibrated, every, order)
        for request in parsed:
            end = start + len(request.images)
            arrays = {name: values[start:end] for name, values in outputs.items()}
            arrays |= self.extras.arrays(request.extras, parts[start:end])
            if request.extras is not None and request.extras.explain is not None:
                arrays |= self.explained(request, best[start:end, 0])
            tensors = [pb_utils.Tensor(name, values) for name, values in arrays.items()]
            responses.append(pb_utils.InferenceResponse(tensors))
            priors.update(request.priors)
            start = end
        self.metrics.count_images(priors, best[:, 0], probability[:, 0])
        if unknown := [row["unknown"] for row in parts if "unknown" in row]:
            self.metrics.count_unknown(len(unknown), sum(unknown))
            if self.unknown_images and any(unknown):
                self.keep_unknown(parsed, parts)
        return responses

    def keep_unknown(self, parsed, parts):
        """Offer the unknown images of a batch to their store. parts: of each row, from extras.py."""
        alarms, start = np.array([row.get("unknown", False) for row in parts]), 0
        for request in parsed:
            end = start + len(request.images)
            if alarms[start:end].any():
                self.unknown_images.offer(self.parser.image_files(request, alarms[start:end]))
            start = end

    def explained(self, request, best):
        """The outputs of explain.py for one parsed request, by one more run of the network. Raises StudentFailed."""
        network = self.balanced_outputs(request.images, self.explanations.network_outputs)
        return self.explanations.outputs(request.extras.explain, network, best)

    def segment(self, parsed, requests):
        """The responses to parsed requests of task segmentation, by index, in order. Raises StudentFailed."""
        wanted = {index: requests[index].requested_output_names() for index in parsed}
        answers = self.segmenter.answer(list(parsed.values()), set().union(*wanted.values()))
        responses, priors = [], Counter()
        for (index, request), values in zip(parsed.items(), answers, strict=True):
            names = [name for name in values if name in wanted[index]]
            tensors = [pb_utils.Tensor(name, np.ascontiguousarray(values[name])) for name in names]
            responses.append(pb_utils.InferenceResponse(tensors))
            priors.update(request.priors)
        best, share = (np.concatenate([values[name][:, 0] for values in answers]) for name in ("index", "probability"))
        self.metrics.count_images(priors, best, share)
        return responses

    def outputs(self, images, second, names):
        """Outputs of the graph of `student`, in this process or by a request to it. Raises StudentFailed."""
        if self.network:
            return self.run_network(images, second, names)
        return self.request_student(images, second, names)

    def balanced_logits(self, images):
        """The network's logits at strength 0, float64 [n,C].

        The logit adjustment is added in this process in float64, not by the graph in float32, so that every finite
        strength gives finite logits, and strengths and target priors use the same code. Raises StudentFailed.
        """
        [logits] = self.balanced_outputs(images, ("logits",))
        if not np.isfinite(logits).all():
            raise StudentFailed(
                f"student {self.version} returned logits that are not finite; export a student with finite logits"
            )
        return logits.astype(np.float64)

    def balanced_outputs(self, images, names):
        """Outputs of the network at strength 0, computed in batches of at most max_batch_size. Raises StudentFailed."""
        starts = range(0, len(images), self.max_batch_size)
        parts = [images[start : start + self.max_batch_size] for start in starts]
        runs = [self.outputs(part, np.zeros((len(part), 1), dtype=np.float32), names) for part in parts]
        return [np.concatenate(values) for values in zip(*runs, strict=True)]

    def run_network(self, images, second, names):
        """Outputs of the graph in this process. Raises StudentFailed."""
        try:
            return self.network.run(images, second, names)
        except Exception as error:  # ONNX Runtime's exceptions have no other common base class
            reason = " ".join(str(error).split())[:300]
            raise StudentFailed(f"student {self.version} failed: {reason}") from error

    def request_student(self, images, second, names):
        """Send the images to `student` of the same version; returns its outputs. Raises StudentFailed."""
        response = pb_utils.InferenceRequest(
            model_name="student",
            model_version=self.version,
            requested_output_names=list(names),
            inputs=[
                pb_utils.Tensor("image", images),
                pb_utils.Tensor("adjustment" if self.segmenter else "strength", second),
            ],
            # Without it a student on a GPU may return device memory, which has no numpy view.
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise StudentFailed(f"student {self.version} failed: {response.error().message()}")
        return [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in names]

    def adjusted_logits(self, calibrated, parsed):
        """The calibrated logits [n,C] of all rows, adjusted for the requested prior of each."""
        log_prior = self.parser.log_prior
        if any(request.log_prior is not log_prior for request in parsed):
            classes = calibrated.shape[1]
            log_prior = np.concatenate([np.broadcast_to(r.log_prior, (len(r.images), classes)) for r in parsed])
        strength = np.concatenate([request.strength for request in parsed])
        return self.prior.adjust_logits(calibrated, log_prior, strength)

    def log(self, request, started, parsed, outcome):
        """Write a line of the access log; parsed is None for a rejected request, whose line has no prior."""
        image = pb_utils.get_input_tensor_by_name(request, "image")
        encoded = [] if image is None else image.as_numpy().reshape(-1)
        prior = None if parsed is None else next(iter(parsed.priors)) if len(parsed.priors) == 1 else "mixed"
        size = sum(len(data) for data in encoded)
        self.access_log.write(request.request_id(), started, len(encoded), size, prior, outcome)


def error_response(message, code):
    """An error response to one request."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def sibling(name):
    """Load the module `name` beside this file, by path: an import by name could find one in site-packages first."""
    spec = importlib.util.spec_from_file_location(f"tailor_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
