"""The errors of serving: an import path that stays valid for serving.shared.errors."""

from serving.shared.errors import InputError, ServingError

__all__ = ["InputError", "ServingError"]
