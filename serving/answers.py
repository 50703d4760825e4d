"""The predictions of the client: an import path that stays valid for serving.client.predictions."""

from serving.client.predictions import ModelStatus, Prediction, Status

__all__ = ["ModelStatus", "Prediction", "Status"]
