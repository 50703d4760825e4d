"""`classifier` for Triton's python backend: encoded images in, the best classes for the requested target prior out.

Runs in an inference process (Triton's stub) with numpy and Pillow and with the files beside it: prior.py and
preprocess.py (copies of the modules of training), asked.py, integrity.py, metrics.py, live_prior.py, start.py and the
logs. The network runs in `student` of the same version, or in this process if the config's parameter `network` is
`own`: running a small network takes less time than a request to `student`.
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
        sibling("integrity").check_graph(graph, manifest)
        asked, live_prior, preprocess = sibling("asked"), sibling("live_prior"), sibling("preprocess")
        self.prior, self.refused = sibling("prior"), asked.Refused
        self.version, self.top_k = int(args["model_version"]), manifest["top_k"]
        self.names = np.array([name.encode() for name in manifest["classes"]], dtype=np.object_)
        live = live_prior.LivePrior(folder.parents[1], manifest["classes"], self.prior)
        self.reader = asked.Reader(manifest, self.prior, preprocess, live, live_prior.NoLivePrior)
        config = json.loads(args["model_config"])
        self.max_batch_size = config["max_batch_size"]
        self.network = self.own_network(graph, config)
        groups = [self.prior.shot_group(count) for count in manifest["counts"]]
        ranks = np.argsort(np.argsort(-np.asarray(manifest["counts"]), kind="stable"), kind="stable")
        self.metrics = sibling("metrics").Metrics(self.version, manifest["classes"], groups, ranks)
        lost = partial(self.metrics.count, "tailor_access_log_lost_total")
        self.access_log = sibling("access_log").open_access_log(args, lost)
        self.logit_log = sibling("logit_log").open_logit_log(args, manifest, self.reader.read_images, self.metrics)
        start = sibling("start")
        start.decode_each_format(preprocess, self.reader.size, self.reader.resize_to)
        start.take_up()

    def own_network(self, graph, config):
        """The graph of `student` of this version, loaded in this process; None if requests go to `student`."""
        if config["parameters"].get("network", {}).get("string_value") != "own":
            return None
        network = sibling("network").Network(graph, config)
        network.warm_up((3, self.reader.size, self.reader.size))
        return network

    def execute(self, requests):
        """Process a batch of requests with one call of the network; a request with an invalid row fails alone."""
        started = time.monotonic()
        responses, outcomes = [None] * len(requests), ["ok"] * len(requests)
        asked = {}
        for place, request in enumerate(requests):
            try:
                asked[place] = self.reader.read(request)
            except self.refused as refused:
                responses[place] = failure(str(refused), pb_utils.TritonError.INVALID_ARG)
                outcomes[place] = refused.reason
                self.metrics.count("tailor_refused_total", reason=refused.reason)
        if asked:
            try:
                answers = self.answers(asked)
            except StudentFailed as failed:
                answers = {place: failure(str(failed), pb_utils.TritonError.INTERNAL) for place in asked}
                self.metrics.count("tailor_failed_total", len(asked))
                outcomes = ["student" if place in asked else outcome for place, outcome in enumerate(outcomes)]
            for place, answer in answers.items():
                responses[place] = answer
        if self.access_log.handler:
            for place, request in enumerate(requests):
                self.log(request, started, asked.get(place), outcomes[place])
        return responses

    def finalize(self):
        """Close the logs and pass the last counts to Triton."""
        if self.logit_log:
            self.logit_log.close()
        self.metrics.close()
        self.access_log.close()

    def answers(self, asked):
        """The responses to the parsed requests, by their index in the batch; counts them. Raises StudentFailed."""
        images = np.concatenate([one.images for one in asked.values()])
        logits = self.balanced_logits(images)
        if self.logit_log:
            self.logit_log.offer(images, logits)
        best, probability = self.best(logits, list(asked.values()))
        answers, start = {}, 0
        index, confidence, names = best.astype(np.int32), probability.astype(np.float32), self.names[best]
        for place, one in asked.items():
            rows = slice(start, start + len(one.images))
            start = rows.stop
            answers[place] = pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor("class", names[rows]),
                    pb_utils.Tensor("index", index[rows]),
                    pb_utils.Tensor("probability", confidence[rows]),
                ]
            )
        priors = Counter()
        for one in asked.values():
            priors.update(one.priors)
        self.metrics.answered(priors, best[:, 0], probability[:, 0])
        return answers

    def balanced_logits(self, images):
        """The network's logits at strength 0, float64 [n,C], computed in batches of at most max_batch_size.

        The logit adjustment is added in this process in float64, not by the graph in float32, so that every finite
        strength gives finite logits, and strengths and target priors use the same code. Raises StudentFailed.
        """
        ask = self.network_logits if self.network else self.student_logits
        starts = range(0, len(images), self.max_batch_size)
        logits = np.concatenate([ask(images[start : start + self.max_batch_size]) for start in starts])
        if not np.isfinite(logits).all():
            raise StudentFailed(f"student {self.version} answered logits that are not finite; export a sound student")
        return logits.astype(np.float64)

    def network_logits(self, images):
        """The logits of the graph in this process, float32 [n,C]. Raises StudentFailed."""
        try:
            return self.network.run(images, np.zeros((len(images), 1), dtype=np.float32), ("logits",))[0]
        except Exception as error:  # ONNX Runtime's exceptions have no other common base class
            reason = " ".join(str(error).split())[:300]
            raise StudentFailed(f"student {self.version} failed: {reason}") from error

    def student_logits(self, images):
        """Send the images to `student` of the same version: logits, float32 [n,C]. Raises StudentFailed."""
        response = pb_utils.InferenceRequest(
            model_name="student",
            model_version=self.version,
            requested_output_names=["logits"],
            inputs=[
                pb_utils.Tensor("image", images),
                pb_utils.Tensor("strength", np.zeros((len(images), 1), dtype=np.float32)),
            ],
            # Without it a student on a GPU may return device memory, which has no numpy view.
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise StudentFailed(f"student {self.version} failed: {response.error().message()}")
        return pb_utils.get_output_tensor_by_name(response, "logits").as_numpy()

    def best(self, logits, asked):
        """Index and probability, [n,K] each, of the best K = top_k classes of each row under its requested prior."""
        log_prior = self.reader.log_prior
        if any(one.log_prior is not log_prior for one in asked):
            log_prior = np.concatenate(
                [np.broadcast_to(one.log_prior, (len(one.images), logits.shape[1])) for one in asked]
            )
        adjusted = self.prior.adjust_logits(logits, log_prior, np.concatenate([one.strength for one in asked]))
        best = np.argsort(-adjusted, axis=-1, kind="stable")[:, : self.top_k]
        return best, np.take_along_axis(self.prior.softmax(adjusted), best, axis=-1)

    def log(self, request, started, asked, outcome):
        """Write a line of the access log; asked is None for a rejected request, whose line has no prior."""
        image = pb_utils.get_input_tensor_by_name(request, "image")
        encoded = [] if image is None else image.as_numpy().reshape(-1)
        prior = None if asked is None else asked.priors.most_common(1)[0][0] if len(asked.priors) == 1 else "mixed"
        size = sum(len(data) for data in encoded)
        self.access_log.write(request.request_id(), started, len(encoded), size, prior, outcome)


def failure(message, code):
    """An error response to one request."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def sibling(name):
    """Load the module `name` beside this file, by path: an import by name could find one in site-packages first."""
    spec = importlib.util.spec_from_file_location(f"tailor_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
