"""The command line: vlfast train, evaluate, predict, demo, recipes, doctor."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from vlfast.errors import VlfastError
from vlfast.version import __version__

COMMANDS = {
    "train": "train a recipe and test it",
    "evaluate": "test a run",
    "predict": "name what images show",
    "demo": "train zero-shot, CoOp and CoOp+PLPP on icons, and show the difference",
    "recipes": "list the recipes",
    "doctor": "say what is installed, which backend serves which op, and what would help",
}
INTERRUPTED = 130


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
            from vlfast.errors import unknown_name

            raise unknown_name("command", command, COMMANDS)
        globals()[f"_{command}"](rest)
    except KeyboardInterrupt:
        print("vlfast: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"vlfast: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _train(argv: list[str]) -> None:
    from vlfast.run import default_output, resume, train
    from vlfast.trainers.recipes import resolve_config

    options = _train_parser(argv)
    if options["resume"]:
        if options["config"]:
            given = ", ".join(sorted(options["config"]))
            raise VlfastError(f"--resume: a run goes on as it began, so no other options ({given})")
        run = _stoppable(resume, options["resume"], options["resume"])
    else:
        config = resolve_config(options["config"])
        if options["print_config"]:
            from dataclasses import asdict

            import yaml

            print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
            return
        run = _stoppable(train, config, str(config.output or default_output(config)))
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(_result_lines(run.result))
        print(f"run: {run.folder.path}")


def _stoppable(start, what: Any, folder: str):
    """Run ``start(what)``; Ctrl-C says how to go on."""
    try:
        return start(what)
    except KeyboardInterrupt:
        from vlfast.trainers.run_folder import RunFolder

        rows = RunFolder(folder).read_metrics()
        done = rows[-1]["epoch"] if rows else 0
        print(
            f"\nvlfast: stopped after {done} finished epochs; go on with "
            f"`vlfast train --resume {folder}`",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)


def _train_parser(argv: list[str]) -> dict[str, Any]:
    """The options of `vlfast train`: {"config": nested options as given, "resume", ...}."""
    import yaml

    from vlfast.trainers.config import SHORTHAND, config_parser, one_line

    parser = config_parser("vlfast train", COMMANDS["train"])
    parser.add_argument(
        "--objective", help="replaces the labels: a kind, or {kind: ..., weight: ...}"
    )
    parser.add_argument(
        "--add", action="append", help="an objective besides: a kind, or {kind: ..., weight: ...}"
    )
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    parser.add_argument(
        "--print_config", action="store_true", help="print the full config as YAML, and stop"
    )
    for action in parser._actions:
        name = action.option_strings[0].removeprefix("--") if action.option_strings else ""
        if name in SHORTHAND:
            action.metavar = SHORTHAND[name].upper()
            action.help = f"short for --{name}.{SHORTHAND[name]}"
    try:
        given = parser.parse_args(_long_form(argv, SHORTHAND), defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise VlfastError(_suggest(one_line(error), parser)) from error
    own = {"resume": given.pop("resume", None), "print_config": given.pop("print_config", False)}
    given.pop("config", None)
    for key in ("objective", "add"):
        if key in given:
            values = given[key] if isinstance(given[key], list) else [given[key]]
            parsed = [yaml.safe_load(v) if isinstance(v, str) else v for v in values]
            given[key] = parsed if key == "add" else parsed[0]
    return {"config": given, **own}


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
    from vlfast.errors import unknown_name

    prefix = "unrecognized arguments: "
    if not message.startswith(prefix):
        return message
    word = message.removeprefix(prefix).split()[0].partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    return str(unknown_name("option", word, known))


def _evaluate(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("vlfast evaluate", description=COMMANDS["evaluate"])
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--data", help="another dataset with the run's prompts")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    from vlfast.run import load

    run = load(options.run, checkpoint=options.checkpoint, device=options.device)
    accuracy = run.evaluate(options.data)
    if options.json:
        print(json.dumps(accuracy, indent=2))
    else:
        print(_accuracy_lines(accuracy))


def _predict(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("vlfast predict", description=COMMANDS["predict"])
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--classnames", help="choose among these, separated by commas")
    parser.add_argument("--top", type=int, default=3, help="how many class names an image")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object an image")
    options = parser.parse_args(argv)
    from vlfast.run import load

    names = options.classnames and [n.strip() for n in options.classnames.split(",") if n.strip()]
    run = load(options.run, checkpoint=options.checkpoint, device=options.device)
    predictions = run.predict(options.images, classnames=names or None, top_k=options.top)
    for path, found in zip(options.images, predictions, strict=True):
        pairs = list(zip(found.classnames, found.probabilities, strict=True))
        if options.json:
            print(json.dumps({"image": path, "classes": [{"name": n, "p": p} for n, p in pairs]}))
        else:
            print(f"{path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in pairs))


def _demo(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("vlfast demo", description=COMMANDS["demo"])
    parser.add_argument("--theme", default="tools", help="which icons")
    parser.add_argument("--output", default="runs/demo", help="where runs and pictures go")
    parser.add_argument("--epochs", type=int, help="instead of the recipes' own")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    from vlfast.demo import run_demo

    run_demo(options.theme, options.output, epochs=options.epochs, seed=options.seed)


def _recipes(argv: list[str]) -> None:
    argparse.ArgumentParser("vlfast recipes", description=COMMANDS["recipes"]).parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    from vlfast.trainers.recipes import RECIPES

    table = Table("recipe", "paper", "equation", "learns")
    for recipe in RECIPES.values():
        table.add_row(recipe.name, recipe.paper, recipe.equation, recipe.learns)
    Console().print(table)


def _doctor(argv: list[str]) -> None:
    argparse.ArgumentParser("vlfast doctor", description=COMMANDS["doctor"]).parse_args(argv)
    from vlfast.doctor import print_report

    print_report()


def _result_lines(result: dict[str, Any]) -> str:
    data = result["data"]
    head = (
        f"{result['recipe']} on {data['name']}: {data['classes']} classes, "
        f"{data['images']['train']} training images, {result['epochs']} epochs, "
        f"{result['train_seconds']:.1f} s"
    )
    return f"{head}\n{_accuracy_lines(result['accuracy'])}"


def _accuracy_lines(accuracy: dict[str, Any]) -> str:
    from vlfast.evaluation.tables import accuracy_table

    return accuracy_table(accuracy)


def _print_usage() -> None:
    print("usage: vlfast COMMAND [options]\n")
    width = max(map(len, COMMANDS))
    for name, what in COMMANDS.items():
        print(f"  {name:<{width}}  {what}")
    print("\n`vlfast COMMAND --help` lists its options; --debug shows where an error came from.")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    expected = (VlfastError, ValueError, TypeError, OSError)
    return text if isinstance(error, expected) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.exit(main())
