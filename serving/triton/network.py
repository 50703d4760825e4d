"""An exported graph in a stub: ONNX Runtime on the cores that the other instances of the same model leave.

An instance alone at work takes every core, so that a lone request is answered soonest; beside others each takes its share:
more threads than cores cost half of the throughput and more, and a small network is slower on two threads than two are on
one each. Runs with numpy and onnxruntime alone.
"""

from __future__ import annotations

import fcntl
import os
import struct

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

OUTPUTS = ("logits", "feature")
# How long ONNX Runtime's threads look out for work before they sleep: over the gaps within a run, which are far shorter.
# Left to itself it goes on for about a second after each run and takes the cores from everyone else. Releases that do not
# know this setting pass it over.
SPIN_MICROSECONDS = 500
# Runs in a row in which nobody else was at work, before an instance takes every core. Under load an instance is at rest
# for a moment between two batches, which is no sign that it will stay so.
QUIET_RUNS = 3
FLOCK = "hhqqi"  # struct flock: type, whence, start, length, process


class Network:
    """A model.onnx, loaded.

    path: the graph. config: the model's own, with the parameters `execution_provider` and `intra_op_thread_count`, 0
    meaning the cores that this process may use. Raises TritonModelException.
    """

    def __init__(self, path, config):
        provider = config["parameters"]["execution_provider"]["string_value"]
        if provider not in onnxruntime.get_available_providers():
            raise pb_utils.TritonModelException(
                f"{provider} is not in this onnxruntime; install onnxruntime-gpu for it"
            )
        threads = int(config["parameters"]["intra_op_thread_count"]["string_value"])
        # Counted here: the cores that this process may use, not all that the machine has. The numbers are strings where
        # the config came through protobuf's JSON.
        cores, instances = len(os.sched_getaffinity(0)), sum(int(group["count"]) for group in config["instance_group"])
        share = threads or max(1, cores // instances)
        self.shared = session_of(path, provider, share)
        self.whole = self.shared
        if not threads and share < cores and provider == "CPUExecutionProvider":
            self.whole = session_of(path, provider, cores)
        self.quiet = 0
        self.file = path.open("rb")  # holds the lock that says who is at work

    def warm_up(self, image_shape):
        """Run an empty image: the first run lays a session's memory out."""
        for session in {self.shared, self.whole}:
            image, strength = np.zeros((1, *image_shape), np.uint8), np.zeros((1, 1), np.float32)
            session.run(OUTPUTS, {"image": image, "strength": strength})

    def run(self, image, strength, outputs=OUTPUTS):
        """The outputs for image uint8 [n,3,S,S] and strength float32 [n,1]."""
        fed = {"image": image, "strength": strength}
        if self.whole is self.shared:
            return self.shared.run(outputs, fed)
        # A lock on the graph's first byte, which any number may hold; the kernel lets go of a dead one's.
        self.lock(fcntl.F_SETLK, fcntl.F_RDLCK)
        try:
            self.quiet = self.quiet + 1 if self.alone() else 0
            session = self.whole if self.quiet >= QUIET_RUNS else self.shared
            return session.run(outputs, fed)
        finally:
            self.lock(fcntl.F_SETLK, fcntl.F_UNLCK)

    def alone(self):
        """Whether no other process is at work, which is to say could everyone be locked out."""
        kind, *_ = struct.unpack(FLOCK, self.lock(fcntl.F_GETLK, fcntl.F_WRLCK))
        return kind == fcntl.F_UNLCK

    def lock(self, command, kind):
        return fcntl.fcntl(self.file, command, struct.pack(FLOCK, kind, os.SEEK_SET, 0, 1, 0))


def session_of(path, provider, threads):
    """An InferenceSession of a graph on so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    # The Python inside a stub takes paths for ASCII, whatever the locale is; ONNX Runtime encodes them as UTF-8.
    return onnxruntime.InferenceSession(os.fsencode(path).decode(), options, providers=[provider])
