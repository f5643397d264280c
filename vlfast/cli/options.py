"""What the commands share: parsers, and messages of one line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from vlfast.errors import VlfastError, unknown_name

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Raises its errors, so that they come out as one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise VlfastError(f"{message}; see `{self.prog} --help`")


def config_options(
    argv: list[str],
    command: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
) -> dict[str, Any]:
    """{"given": nested options from the YAML files and the command line}, and what the command's
    own arguments got, None where they were not given."""
    from vlfast.trainers import config as trainers_config
    from vlfast.trainers.config import SHORTHAND, config_parser, merge_options

    parser = config_parser(f"vlfast {command}", description)
    ours = {action.dest for action in parser._actions}
    add_arguments(parser)
    own = [action.dest for action in parser._actions if action.dest not in ours]
    parser.add_argument(
        "--config", action="append", metavar="FILE", help="a YAML file with these options"
    )
    parser.add_argument(
        "--objective", help="replaces the labels: a kind, or {kind: ..., weight: ...}"
    )
    parser.add_argument(
        "--add", action="append", help="an objective besides: a kind, or {kind: ..., weight: ...}"
    )
    for action in parser._actions:
        name = action.option_strings[0].removeprefix("--") if action.option_strings else ""
        if name in SHORTHAND:
            action.metavar = SHORTHAND[name].upper()
            action.help = f"short for --{name}.{SHORTHAND[name]}"
    try:
        given = parser.parse_args(_long_form(argv, SHORTHAND), defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise VlfastError(_suggest(trainers_config.one_line(error), parser)) from error
    options = {key: given.pop(key, None) for key in ("config", *own)}
    for key in ("objective", "add"):
        if key in given:
            values = given[key] if isinstance(given[key], list) else [given[key]]
            parsed = [yaml.safe_load(v) if isinstance(v, str) else v for v in values]
            given[key] = parsed if key == "add" else parsed[0]
    for file in reversed(options.pop("config") or []):
        given = merge_options(read_yaml(file), given)
    return {"given": given, **options}


def read_yaml(file: str) -> dict[str, Any]:
    from vlfast.trainers.config import expand_shorthand

    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--config: there is no file {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise VlfastError(f"--config: {path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise VlfastError(f"--config: expected options by name in {path}, got {values!r}")
    return expand_shorthand(values)


def _long_form(argv: list[str], shorthand: dict[str, str]) -> list[str]:
    """`--recipe coop` as `--recipe.name coop`."""
    words = []
    for word in argv:
        option, equals, value = word.partition("=")
        if option.startswith("--") and option[2:] in shorthand:
            word = f"{option}.{shorthand[option[2:]]}{equals}{value}"
        words.append(word)
    return words


def _suggest(message: str, parser: argparse.ArgumentParser) -> str:
    """Add the nearest option to a message about one that is not known."""
    prefix = "unrecognized arguments: "
    if not message.startswith(prefix):
        return message
    word = message.removeprefix(prefix).split()[0].partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    return str(unknown_name("option", word, known))


def accuracy_lines(accuracy: dict[str, Any], best: dict[str, Any] | None = None) -> str:
    from vlfast.evaluation.tables import accuracy_table

    return accuracy_table(accuracy, best)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (VlfastError, ValueError, TypeError, OSError)):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where it came from)"


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
