"""The `moesim` command: one group, one module a command. Nothing heavy is imported until a command runs."""

from moesim.cli.main import main

__all__ = ["main"]
