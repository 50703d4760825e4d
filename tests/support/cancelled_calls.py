"""gRPC calls that their caller cancels, or whose deadline passes, while the server works on them."""

from __future__ import annotations

import random
import time

import grpc
from tritonclient.grpc import service_pb2_grpc

from tests.support.bad_requests import TensorRequest, good_inputs, over_grpc

IN_FLIGHT = 8


def cancel_calls(grpc_url: str, seconds: float, seed: int = 0) -> int:
    """Inferences for some seconds, eight at a time, of which every second one is cancelled and the others have a deadline
    about as long as an answer takes. Stops early when the server has exited. Returns the number of calls.
    """
    draw, calls, end = random.Random(seed), 0, time.monotonic() + seconds
    message = over_grpc(TensorRequest("", "", "classifier", good_inputs("classifier", 1)))
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(grpc_url.partition("://")[2], options=options) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        began = time.monotonic()
        stub.ModelInfer(message, timeout=20)
        typical = time.monotonic() - began
        while time.monotonic() < end:
            running = [
                stub.ModelInfer.future(message, timeout=20 if index % 2 else draw.uniform(0.3, 1.6) * typical)
                for index in range(IN_FLIGHT)
            ]
            time.sleep(draw.uniform(0, 1.5 * typical))
            for call in running[1::2]:
                call.cancel()
                time.sleep(draw.uniform(0, typical / 4))
            codes = [call.code() for call in running]
            calls += len(running)
            if grpc.StatusCode.UNAVAILABLE in codes:
                break
    return calls
