"""The commands of serving, one module per group of commands; `app` holds the Typer application."""

from serving.commands.app import main

__all__ = ["main"]
