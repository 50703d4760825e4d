"""Alias of models.contrast.queues: an import path kept for compatibility."""

from models.contrast.queues import ClassQueues

__all__ = ["ClassQueues"]
