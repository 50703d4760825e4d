"""Command line of serving: one module per group of commands; `app` defines the Typer application."""

from serving.commands.app import main

__all__ = ["main"]
