"""Client and AsyncClient, priors, images, predictions."""

from serving.client.async_client import AsyncClient
from serving.client.sync_client import Client

__all__ = ["AsyncClient", "Client"]
