"""The command line: one file a command."""

from vlfast.cli.commands import COMMANDS, main

__all__ = ["COMMANDS", "main"]
