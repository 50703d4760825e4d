"""`student` for Triton's python backend: runs the model.onnx beside it where Triton has no onnxruntime backend.

Same inputs, outputs and results as the onnxruntime backend with the same file. Runs in an inference process (Triton's
stub) with numpy and onnxruntime, and with network.py and start.py beside it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The model. Triton calls initialize once and execute for each batch."""

    def initialize(self, args):
        """Check model.onnx against the manifest beside it, load it and warm it up; an exception fails the load."""
        folder = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        # int(), because protobuf's JSON writes 64-bit numbers as strings.
        self.image_shape = tuple(int(side) for side in config["input"][0]["dims"])
        # `strength` of a classifier, `adjustment` of a segmentation graph.
        self.second, self.width = config["input"][1]["name"], int(config["input"][1]["dims"][0])
        self.outputs = [tensor["name"] for tensor in config["output"]]
        sibling("start").check_graph(folder / "model.onnx", json.loads((folder / "manifest.json").read_bytes()))
        self.network = sibling("network").Network(folder / "model.onnx", config)
        self.network.warm_up(self.image_shape)
        sibling("start").apply_priority()

    def execute(self, requests):
        """Process all requests of a batch in one run of the graph; a request with an invalid input fails alone."""
        responses = [None] * len(requests)
        indexes, images, seconds, requested = [], [], [], set()
        for index, request in enumerate(requests):
            image = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
            second = pb_utils.get_input_tensor_by_name(request, self.second).as_numpy()
            responses[index] = self.input_error(image, second)
            if responses[index] is None:
                indexes.append(index)
                images.append(image)
                seconds.append(second)
                requested.update(request.requested_output_names())
        if indexes:
            # Only the requested outputs, because each is copied to the server.
            names = [name for name in self.outputs if name in requested] or self.outputs
            outputs = self.network.run(concatenate(images), concatenate(seconds), names)
            # One check of the whole batch: checks of each request's rows would take longer than the rest of this
            # method.
            finite = all(np.isfinite(output).all() for output in outputs)
            end = 0
            for index, image in zip(indexes, images, strict=True):
                start, end = end, end + len(image)
                responses[index] = build_response(names, [output[start:end] for output in outputs], finite)
        return responses

    def input_error(self, image, second):
        """The error response to a request with invalid inputs, else None."""
        # Triton checks the shapes too, but its product of huge sides overflows, and wrong shapes pass.
        if image.shape[1:] != self.image_shape or second.shape != (len(image), self.width):
            return error_response(
                f"image has shape {list(image.shape)} and {self.second} {list(second.shape)}; "
                f"expected [n, {', '.join(map(str, self.image_shape))}] and [n, {self.width}]"
            )
        if not np.isfinite(second).all():
            return error_response(f"{self.second} holds a number that is not finite; expected finite numbers")
        return None


def build_response(names, values, finite):
    """The response to one request, from its rows of the outputs. finite: True if the outputs are known to be finite."""
    if not finite and not all(np.isfinite(value).all() for value in values):
        return error_response(
            "the outputs have a number that is not finite; send a smaller strength or a different image"
        )
    tensors = [pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in zip(names, values, strict=True)]
    return pb_utils.InferenceResponse(tensors)


def concatenate(arrays):
    """Concatenate the rows of all requests; does not copy if there is one request."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def error_response(message):
    """An error response to one request with invalid inputs (INVALID_ARG)."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))


def sibling(name):
    """Load the module `name` beside this file, by path: an import by name could find one in site-packages first."""
    spec = importlib.util.spec_from_file_location(f"tailor_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
