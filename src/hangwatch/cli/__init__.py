"""The command line: run, serve, demo."""

from hangwatch.cli.commands import main

__all__ = ["main"]
