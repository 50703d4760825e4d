"""gRPC calls that are cancelled, or whose deadline passes, while the server processes them."""

from __future__ import annotations

import random
import time

import grpc
from tritonclient.grpc import service_pb2_grpc

from tests.support.bad_requests import TensorRequest, good_inputs, over_grpc

IN_FLIGHT = 8


def cancel_calls(grpc_url: str, seconds: float, seed: int = 0) -> int:
    """Send inferences for `seconds`, eight in flight; return the number of calls.

    Every second call is cancelled; the others have a deadline of about one response time. Stops early when the server
    has exited.
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
