"""Run one inference with KServe's client in a separate process: its protobuf messages conflict with Triton's.

Standard input: {url, protocol (rest or grpc), model, binary, inputs: [{name, datatype, shape, base64}]}. Prints the
outputs by name as lists; strings as UTF-8.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

DTYPES = {"FP32": np.float32, "UINT8": np.uint8}


def array_of(tensor: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(tensor["base64"])
    if tensor["datatype"] == "BYTES":
        return np.array([[data]], dtype=np.object_)
    return np.frombuffer(data, DTYPES[tensor["datatype"]]).reshape(tensor["shape"])


async def infer(task: dict[str, Any]) -> Any:
    inputs = []
    for tensor in task["inputs"]:
        inputs.append(InferInput(tensor["name"], tensor["shape"], tensor["datatype"]))
        inputs[-1].set_data_from_numpy(array_of(tensor), binary_data=task["binary"])
    request = InferRequest(task["model"], inputs)
    if task["protocol"] == "rest":
        async with InferenceRESTClient(RESTConfig(protocol="v2", timeout=20)) as client:
            assert await client.is_server_ready(task["url"])
            return await client.infer(task["url"], request, model_name=task["model"])
    async with InferenceGRPCClient(task["url"].partition("://")[2], timeout=20) as client:
        assert await client.is_server_ready()
        return await client.infer(request)


def plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


answer = asyncio.run(infer(json.load(sys.stdin)))
print(json.dumps({output.name: [plain(v) for v in np.ravel(output.as_numpy()).tolist()] for output in answer.outputs}))
