"""The Python client: Client and AsyncClient, their options, input images, priors and predictions."""

from serving.client.async_client import AsyncClient
from serving.client.extras import Extras
from serving.client.sync_client import Client

__all__ = ["AsyncClient", "Client", "Extras"]
