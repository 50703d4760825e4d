"""The client: images and a prior in, typed predictions out."""

from serving.answers import ModelStatus, Prediction, Status
from serving.async_client import AsyncClient
from serving.client import Client
from serving.errors import InputError, ServingError
from serving.priors import Prior
from serving.retries import Retries

__all__ = [
    "AsyncClient",
    "Client",
    "InputError",
    "ModelStatus",
    "Prediction",
    "Prior",
    "Retries",
    "ServingError",
    "Status",
]
