"""One way to ask Triton, over HTTP or gRPC alike: arrays in, arrays out, failures as one-line errors."""

from __future__ import annotations

import http.client
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from serving.errors import InputError, ServingError

SCHEMES = {"http": ("http", False), "https": ("http", True), "grpc": ("grpc", False), "grpcs": ("grpc", True)}
CONNECT_TIMEOUT = 10.0  # seconds
REASON_LENGTH = 500
UNREACHABLE = ("StatusCode.UNAVAILABLE", "StatusCode.UNKNOWN", "StatusCode.INTERNAL")


class Refused(ServingError):
    """The server answered, and said no; the message is its reason."""


class Transport:
    """A connection to one Triton server, opened when first used. Not for use by several threads at a time.

    url: http://host:port, https://…, grpc://host:port or grpcs://…. timeout: seconds a request may take. Its methods
    raise ServingError: Refused when the server says no, else that no Triton server answers or that it took too long.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url
        self.timeout = timeout
        self.protocol, secure, address = parse_url(url)
        self._api: Any = importlib.import_module(f"tritonclient.{self.protocol}")
        if self.protocol == "http":
            self._client = self._api.InferenceServerClient(
                address, ssl=secure, connection_timeout=min(timeout, CONNECT_TIMEOUT), network_timeout=timeout
            )
            self._limit: dict[str, Any] = {}
            self._as_dict: dict[str, Any] = {}
        else:
            self._client = self._api.InferenceServerClient(address, ssl=secure)
            self._limit = {"client_timeout": timeout}
            self._as_dict = {"as_json": True, "client_timeout": timeout}

    def close(self) -> None:
        """Close the connection; an open one would hold up the server's shutdown."""
        self._client.close()

    def server_metadata(self) -> dict[str, Any]:
        """Triton's own name and version."""
        with self._failures():
            return self._client.get_server_metadata(**self._as_dict)

    def model_metadata(self, model: str, version: str = "") -> dict[str, Any]:
        """A model's versions, inputs and outputs; shapes as Triton writes them, -1 for the batch."""
        with self._failures():
            return self._client.get_model_metadata(model, version, **self._as_dict)

    def model_config(self, model: str) -> dict[str, Any]:
        """A model's config.pbtxt as a mapping."""
        with self._failures():
            found = self._client.get_model_config(model, **self._as_dict)
        return found["config"] if self.protocol == "grpc" else found

    def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, int], version: str = ""
    ) -> tuple[dict[str, np.ndarray], int]:
        """One inference: the outputs by name, and the version that answered.

        inputs: arrays by name, object arrays of bytes for strings. outputs: name to 0 for the tensor as it is, or to n
        for Triton's classification of it, n strings "value:index:label" a row.
        """
        tensors = []
        for name, array in inputs.items():
            tensor = self._api.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        wanted = [self._api.InferRequestedOutput(name, class_count=count) for name, count in outputs.items()]
        with self._failures():
            result = self._client.infer(model, tensors, model_version=version, outputs=wanted, **self._limit)
            response = result.get_response()
            answered = {name: result.as_numpy(name) for name in outputs}
        if any(array is None for array in answered.values()):
            raise ServingError(f"{self.url}: {model} left out an output; serve a repository that `dvc repro` wrote")
        return answered, int(response["model_version"] if self.protocol == "http" else response.model_version)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what the two client libraries raise into ServingError."""
        nobody = f"no Triton server answers at {self.url}; start one with `tailor serve` or give another --url"
        late = f"{self.url} did not answer within {self.timeout:g} s; try again or allow a longer timeout"
        try:
            yield
        except InferenceServerException as error:
            status, reason = str(error.status()), " ".join(str(error.message()).split())
            if status in ("StatusCode.DEADLINE_EXCEEDED", "499"):
                raise ServingError(late) from error
            foreign = "while decoding the response" in reason  # tritonclient's words for an answer that is not Triton's
            absent = status in UNREACHABLE and "restrict" not in reason.lower()
            if foreign or absent:
                raise ServingError(nobody) from error
            raise Refused(f"{self.url} refused: {reason[:REASON_LENGTH]}") from error
        except TimeoutError as error:
            raise ServingError(late) from error
        except (
            OSError,
            http.client.HTTPException,
            ValueError,
        ) as error:  # ValueError: an answer that is not Triton's JSON
            raise ServingError(nobody) from error


def parse_url(url: str) -> tuple[str, bool, str]:
    """Protocol (http or grpc), whether it is encrypted, and host:port of a server's address. Raises InputError."""
    hint = "expected http://host:port or grpc://host:port"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InputError(f"url is {url!r}; {hint}") from None
    if parts.scheme not in SCHEMES or not parts.hostname or parts.query or parts.fragment:
        raise InputError(f"url is {url!r}; {hint}")
    protocol, secure = SCHEMES[parts.scheme]
    if protocol == "grpc" and (port is None or parts.path not in ("", "/")):
        raise InputError(f"url is {url!r}; {hint}")
    return protocol, secure, (parts.netloc + parts.path).rstrip("/")
