"""Client API: send images and a prior, receive typed predictions."""

from serving.client.async_client import AsyncClient
from serving.client.extras import Extras
from serving.client.predictions import Decision, ModelStatus, Prediction, Status
from serving.client.priors import Prior
from serving.client.sync_client import Client
from serving.shared.errors import InputError, ServingError
from serving.transport.retries import Retries

__all__ = [
    "AsyncClient",
    "Client",
    "Decision",
    "Extras",
    "InputError",
    "ModelStatus",
    "Prediction",
    "Prior",
    "Retries",
    "ServingError",
    "Status",
]
