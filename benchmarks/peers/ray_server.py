"""Ray Serve server with default batching: a replica per core, raw bytes in, JSON out."""

from __future__ import annotations

import threading

import numpy as np
import ray
from ray import serve
from session import MAX_BATCH, PORT, WORKERS, Student
from starlette.requests import Request
from starlette.responses import JSONResponse


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=2 * MAX_BATCH, ray_actor_options={"num_cpus": 1})
class StudentDeployment:
    def __init__(self) -> None:
        self.student = Student()

    @serve.batch(max_batch_size=MAX_BATCH)
    async def logits(self, images: list[np.ndarray]) -> list[list[float]]:
        return self.student.logits(np.stack(images)).tolist()

    async def __call__(self, request: Request) -> JSONResponse:
        # An explicit JSONResponse has a Content-Length; a returned value would be sent in chunks.
        return JSONResponse(await self.logits(self.student.pixels(await request.body())))


if __name__ == "__main__":
    ray.init(num_cpus=WORKERS, include_dashboard=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(StudentDeployment.bind(), route_prefix="/predict")
    threading.Event().wait()
