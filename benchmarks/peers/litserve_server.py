"""LitServe server with dynamic batching: a worker per core, multipart bytes in, JSON out."""

# No `from __future__ import annotations`: LitServe reads the annotation of decode_request's argument.
import litserve
import numpy as np
from session import BATCH_SECONDS, MAX_BATCH, PORT, WORKERS, Student


class StudentApi(litserve.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002
        self.student = Student()

    def decode_request(self, request: litserve.Request) -> np.ndarray:
        return self.student.pixels(request["image"].file.read())

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, images: np.ndarray) -> np.ndarray:
        return self.student.logits(images)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> list[float]:
        return output.tolist()


if __name__ == "__main__":
    api = StudentApi(max_batch_size=MAX_BATCH, batch_timeout=BATCH_SECONDS)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS, timeout=60)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning")
