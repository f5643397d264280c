"""The command line: which commands there are, and what becomes of their errors."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from vlfast.cli.options import INTERRUPTED, is_first_process, one_line
from vlfast.errors import unknown_name
from vlfast.version import __version__

COMMANDS = (
    "train",
    "run",
    "report",
    "features",
    "data",
    "evaluate",
    "predict",
    "interpret",
    "checkpoint",
    "cost",
    "demo",
    "recipes",
    "doctor",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 for an error that the user can put right, with one line
    that says how (``--debug`` shows where it came from)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        _print_usage()
        return 0
    if argv[0] == "--version":
        print(f"vlfast {__version__}")
        return 0
    command, rest = argv[0], argv[1:]
    try:
        if command not in COMMANDS:
            raise unknown_name("command", command, COMMANDS)
        with _plain_warnings():
            _module(command).main(rest)
    except KeyboardInterrupt:
        if is_first_process():
            print("vlfast: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"{_process_name()}: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """What is warned of is for the user: one line, without the line of code that says it."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{_process_name()}: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _process_name() -> str:
    """Who speaks: of several processes that a launcher started, the first alone goes unnumbered."""
    return "vlfast" if is_first_process() else f"vlfast (process {os.environ['RANK']})"


def _print_usage() -> None:
    print("usage: vlfast COMMAND [options]\n")
    width = max(map(len, COMMANDS))
    for name in COMMANDS:
        print(f"  {name:<{width}}  {_module(name).HELP}")
    print("\n`vlfast COMMAND --help` lists its options; --debug shows where an error came from.")


def _module(command: str) -> ModuleType:
    return import_module(f"vlfast.cli.{command}")
