"""The command `tailor`, one module per group of commands; `app` lists them all."""

from serving.commands.app import main

__all__ = ["main"]
