"""Class-wise queues: an import path that stays valid for models.contrast.queues."""

from models.contrast.queues import ClassQueues

__all__ = ["ClassQueues"]
