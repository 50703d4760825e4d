"""Run an exported graph with ONNX Runtime in an inference process; the instances of a model share the cores.

While one instance works alone it uses every core, for the lowest latency of a single request. While several work, each
uses its share: more threads than cores cost half of the throughput or more, and a small network on two threads is
slower than two networks on one thread each. Needs only numpy and onnxruntime.
"""

from __future__ import annotations

import fcntl
import os
import struct

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

OUTPUTS = ("logits", "feature")
# Time that ONNX Runtime's threads spin for work before they sleep: longer than the gaps within a run. Its default is
# about 1 s after each run, which takes the cores from all other processes. Releases without this setting ignore it.
SPIN_MICROSECONDS = 500
# An instance uses every core only after this number of runs in a row without another working instance. Under load the
# other instances are idle for short times between two batches.
QUIET_RUNS = 3
FLOCK = "hhqqi"  # struct flock: type, whence, start, length, process


class Network:
    """A loaded model.onnx.

    path: of the graph. config: of the model, with the parameters `execution_provider` and `intra_op_thread_count`; 0
    means the cores that this process may use. Raises TritonModelException if onnxruntime lacks the provider.
    """

    def __init__(self, path, config):
        provider = config["parameters"]["execution_provider"]["string_value"]
        if provider not in onnxruntime.get_available_providers():
            raise pb_utils.TritonModelException(
                f"{provider} is not in this onnxruntime; install onnxruntime-gpu for it"
            )
        threads = int(config["parameters"]["intra_op_thread_count"]["string_value"])
        # The cores that this process may use, not all of the machine. int(), because the config's numbers may be
        # strings.
        cores, instances = len(os.sched_getaffinity(0)), sum(int(group["count"]) for group in config["instance_group"])
        share = threads or max(1, cores // instances)
        self.share_session = new_session(path, provider, share)
        self.full_session = self.share_session
        if not threads and share < cores and provider == "CPUExecutionProvider":
            self.full_session = new_session(path, provider, cores)
        # `strength` of a classifier, one number a row; `adjustment` of a segmentation graph, one a class.
        self.second = self.share_session.get_inputs()[1]
        self.quiet_runs = 0
        self.file = path.open("rb")  # for the lock that marks this process as working

    def warm_up(self, image_shape):
        """Run a black image in each session, because the first run allocates the session's memory."""
        for session in {self.share_session, self.full_session}:
            image, second = np.zeros((1, *image_shape), np.uint8), np.zeros((1, self.second.shape[1]), np.float32)
            session.run(None, {"image": image, self.second.name: second})

    def run(self, image, second, outputs=OUTPUTS):
        """The outputs for image uint8 [n,3,H,W] and the second input: strength float32 [n,1], or adjustment [n,C]."""
        inputs = {"image": image, self.second.name: second}
        if self.full_session is self.share_session:
            return self.share_session.run(outputs, inputs)
        # A shared lock on the first byte of the graph's file marks a working process. The kernel releases it when the
        # process dies.
        self.lock(fcntl.F_SETLK, fcntl.F_RDLCK)
        try:
            self.quiet_runs = self.quiet_runs + 1 if self.alone() else 0
            session = self.full_session if self.quiet_runs >= QUIET_RUNS else self.share_session
            return session.run(outputs, inputs)
        finally:
            self.lock(fcntl.F_SETLK, fcntl.F_UNLCK)

    def alone(self):
        """Whether no other process runs this graph at the moment: whether an exclusive lock would be granted."""
        kind, *_ = struct.unpack(FLOCK, self.lock(fcntl.F_GETLK, fcntl.F_WRLCK))
        return kind == fcntl.F_UNLCK

    def lock(self, command, kind):
        """fcntl's lock command on the first byte of the graph's file; returns the resulting struct flock."""
        return fcntl.fcntl(self.file, command, struct.pack(FLOCK, kind, os.SEEK_SET, 0, 1, 0))


def new_session(path, provider, threads):
    """An InferenceSession of the graph at `path` with this number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    # Python in an inference process decodes paths as ASCII in every locale; ONNX Runtime encodes them as UTF-8.
    return onnxruntime.InferenceSession(os.fsencode(path).decode(), options, providers=[provider])
