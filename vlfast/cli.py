"""The command line: vlfast train, features, evaluate, predict, interpret, cost, demo, recipes,
doctor."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from vlfast.errors import VlfastError, unknown_name
from vlfast.version import __version__

if TYPE_CHECKING:
    from vlfast.run import Run

COMMANDS = {
    "train": "train a recipe and test it",
    "features": "store what the frozen models make of the training images, to train from",
    "evaluate": "test a run",
    "predict": "name what images show",
    "interpret": "say what a run learned in words, and which hard prompts its gate picks",
    "cost": "measure what recipes cost: parameters, time, memory, speed at test",
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
            raise unknown_name("command", command, COMMANDS)
        globals()[f"_{command}"](rest)
    except KeyboardInterrupt:
        if _is_first_process():
            print("vlfast: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"{_process_name()}: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _process_name() -> str:
    """Who speaks: of several processes that a launcher started, the first alone goes unnumbered."""
    return "vlfast" if _is_first_process() else f"vlfast (process {os.environ['RANK']})"


def _train(argv: list[str]) -> None:
    from vlfast.run import default_output, resume, train
    from vlfast.trainers.recipes import resolve_config

    options = _config_options(argv, "train", _train_arguments)
    if options["resume"]:
        if options["given"]:
            names = ", ".join(sorted(options["given"]))
            raise VlfastError(f"--resume: a run goes on as it began, so no other options ({names})")
        run = _stoppable(resume, options["resume"], options["resume"])
    else:
        config = resolve_config(options["given"])
        if options["print_config"]:
            print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
            return
        run = _stoppable(train, config, str(config.output or default_output(config)))
    from accelerate import PartialState

    processes = PartialState()
    if processes.is_main_process:
        print(_result_lines(run.result))
        print(f"run: {run.folder.path}")
    processes.destroy_process_group()


def _stoppable(start: Callable[[Any], Run], what: Any, folder: str) -> Run:
    """Run ``start(what)``; Ctrl-C says how to go on."""
    try:
        return start(what)
    except KeyboardInterrupt:
        from vlfast.trainers.run_folder import RunFolder

        if not _is_first_process():
            sys.exit(INTERRUPTED)
        started = RunFolder(folder)
        if started.started:
            rows = started.read_metrics()
            done = rows[-1]["epoch"] if rows else 0
            print(
                f"\nvlfast: stopped after {done} finished epochs; go on with "
                f"`vlfast train --resume {folder}`",
                file=sys.stderr,
            )
        else:
            print("\nvlfast: stopped, nothing was trained yet", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    parser.add_argument(
        "--print_config", action="store_true", help="print the full config as YAML, and stop"
    )


def _features(argv: list[str]) -> None:
    from vlfast.features import write_features
    from vlfast.trainers.recipes import resolve_config

    options = _config_options(argv, "features", _features_arguments)
    given = options["given"]
    if options["views"] is not None:
        given = {**given, "data": {**given.get("data", {}), "views": options["views"]}}
    if "output" not in given:
        raise VlfastError("--output: expected the folder that the features go to")
    path = write_features(resolve_config(given), given["output"], dtype=options["dtype"] or "fp32")
    print(f"features: {path}")


def _features_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--views", type=int, help="short for --data.views")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16"), help="what is kept on disk, fp32 by default"
    )


def _config_options(
    argv: list[str], command: str, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> dict[str, Any]:
    """{"given": nested options from the YAML files and the command line}, and what the command's
    own arguments got, None where they were not given."""
    from vlfast.trainers.config import SHORTHAND, config_parser, merge_options, one_line

    parser = config_parser(f"vlfast {command}", COMMANDS[command])
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
        raise VlfastError(_suggest(one_line(error), parser)) from error
    options = {key: given.pop(key, None) for key in ("config", *own)}
    for key in ("objective", "add"):
        if key in given:
            values = given[key] if isinstance(given[key], list) else [given[key]]
            parsed = [yaml.safe_load(v) if isinstance(v, str) else v for v in values]
            given[key] = parsed if key == "add" else parsed[0]
    for file in reversed(options.pop("config") or []):
        given = merge_options(_read_yaml(file), given)
    return {"given": given, **options}


def _read_yaml(file: str) -> dict[str, Any]:
    from vlfast.trainers.config import expand_shorthand

    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--config: there is no file {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise VlfastError(f"--config: {path} is not valid YAML: {_one_line(error)}") from error
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


class _Parser(argparse.ArgumentParser):
    """Raises its errors, so that they come out as one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise VlfastError(f"{message}; see `{self.prog} --help`")


def _evaluate(argv: list[str]) -> None:
    parser = _Parser("vlfast evaluate", description=COMMANDS["evaluate"])
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--data", help="another dataset with the run's prompts")
    parser.add_argument("--data.root", dest="root", help="the folder of its images")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    from vlfast.run import load

    run = load(options.run, checkpoint=options.checkpoint, device=options.device)
    accuracy = run.evaluate(options.data, root=options.root)
    if options.json:
        print(json.dumps(accuracy, indent=2))
    else:
        print(_accuracy_lines(accuracy))


def _predict(argv: list[str]) -> None:
    parser = _Parser("vlfast predict", description=COMMANDS["predict"])
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


def _interpret(argv: list[str]) -> None:
    parser = _Parser("vlfast interpret", description=COMMANDS["interpret"])
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--top", type=int, default=3, help="how many words a context vector")
    parser.add_argument(
        "--classes",
        type=int,
        help="how many classes at most, where there is something to show for each: 3 of "
        "class-specific contexts, 40 of a mixture",
    )
    parser.add_argument(
        "--over-training",
        action="store_true",
        help="each vector's nearest word after every epoch, as a table and as words.png",
    )
    parser.add_argument(
        "--mixture",
        action="store_true",
        help="which hard prompts the gate of a mixture picks for the test images of each class, "
        "as a table and as mixture.png",
    )
    parser.add_argument("--output", help="the folder of the pictures; by default the run's")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    from vlfast import interpret
    from vlfast.evaluation.plots import plot_prompt_shares, plot_word_history
    from vlfast.run import load

    run = load(options.run, checkpoint=options.checkpoint, device=options.device)
    folder = Path(options.output or options.run)
    classes = {} if options.classes is None else {"classes": options.classes}
    words = history = shares = None
    if options.over_training:
        history = interpret.words_over_training(run, **classes)
        plot_word_history(history, folder / "words.png", title=f"nearest words, {run.folder.path}")
    if options.mixture:
        shares = interpret.prompt_shares(run, checkpoint=options.checkpoint)
        title = f"hard prompts that the gate picks, {run.folder.path}"
        plot_prompt_shares(shares, folder / "mixture.png", title=title, **classes)
    if not (options.over_training or options.mixture):
        words = interpret.context_words(run, count=options.top, **classes)
    if options.json:
        print(json.dumps(interpret.as_json(words, history, shares), indent=2))
        return
    if words is not None:
        print(interpret.words_table(words))
    if history is not None:
        print(interpret.history_table(history))
        print(f"picture: {folder / 'words.png'}")
    if shares is not None:
        print(interpret.shares_table(shares, **classes))
        print(f"picture: {folder / 'mixture.png'}")


def _cost(argv: list[str]) -> None:
    parser = _Parser("vlfast cost", description=COMMANDS["cost"])
    parser.add_argument("recipes", nargs="*", help="by default all of them")
    parser.add_argument(
        "--model",
        default="ViT-B-16",
        help="any name of open_clip, with random weights, or a bundled model",
    )
    parser.add_argument("--teacher", help="of recipes that need one; by default as --model")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, help="instead of the recipes' own")
    parser.add_argument("--steps", type=int, default=5, help="how many are timed")
    parser.add_argument("--config", metavar="FILE", help="a YAML file of options over the recipes'")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", metavar="FILE", help="write .csv, .md or .json too")
    options = parser.parse_args(argv)
    kinds = (".csv", ".md", ".json")
    if options.output and Path(options.output).suffix not in kinds:
        raise VlfastError(f"--output: expected a .csv, .md or .json file, got {options.output}")
    from vlfast import cost
    from vlfast.trainers.config import merge_options

    given: dict[str, Any] = {"model": {"device": options.device}}
    if options.batch_size is not None:
        given["recipe"] = {"batch_size": options.batch_size}
    if options.config:
        given = merge_options(_read_yaml(options.config), given)
    costs = cost.compare_costs(
        options.recipes or None,
        model=options.model,
        classes=options.classes,
        teacher=options.teacher,
        options=given,
        steps=options.steps,
        report=lambda one: print(
            f"{one.recipe} {'failed' if one.failed else 'measured'}", file=sys.stderr
        ),
    )
    about = cost.about(costs, options.model, options.classes)
    if options.output:
        cost.write_costs(costs, options.output, about)
    if options.json:
        print(json.dumps([asdict(one) for one in costs], indent=2))
    else:
        print(f"{cost.cost_table(costs)}\n{about}")


def _demo(argv: list[str]) -> None:
    parser = _Parser("vlfast demo", description=COMMANDS["demo"])
    parser.add_argument("--theme", default="tools", help="which icons")
    parser.add_argument("--output", default="runs/demo", help="where runs and pictures go")
    parser.add_argument("--epochs", type=int, help="instead of the recipes' own")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    from vlfast.demo import run_demo

    run_demo(options.theme, options.output, epochs=options.epochs, seed=options.seed)


def _recipes(argv: list[str]) -> None:
    _Parser("vlfast recipes", description=COMMANDS["recipes"]).parse_args(argv)
    from rich.console import Console
    from rich.table import Table

    from vlfast.trainers.recipes import RECIPES

    table = Table("recipe", "paper", "equation", "learns")
    for recipe in RECIPES.values():
        table.add_row(recipe.name, recipe.paper, recipe.equation, recipe.learns)
    Console().print(table)


def _doctor(argv: list[str]) -> None:
    _Parser("vlfast doctor", description=COMMANDS["doctor"]).parse_args(argv)
    from vlfast.doctor import print_report

    print_report()


def _result_lines(result: dict[str, Any]) -> str:
    data = result["data"]
    trained = (
        f"{data['images']['train']} training images, {result['epochs']} epochs, "
        f"{result['train_seconds']:.1f} s"
        if result["epochs"]
        else "nothing trained"
    )
    head = f"{result['recipe']} on {data['name']}: {data['classes']} classes, {trained}"
    return f"{head}\n{_accuracy_lines(result['accuracy'], result.get('best'))}"


def _accuracy_lines(accuracy: dict[str, Any], best: dict[str, Any] | None = None) -> str:
    from vlfast.evaluation.tables import accuracy_table

    return accuracy_table(accuracy, best)


def _print_usage() -> None:
    print("usage: vlfast COMMAND [options]\n")
    width = max(map(len, COMMANDS))
    for name, what in COMMANDS.items():
        print(f"  {name:<{width}}  {what}")
    print("\n`vlfast COMMAND --help` lists its options; --debug shows where an error came from.")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (VlfastError, ValueError, TypeError, OSError)):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where it came from)"


if __name__ == "__main__":
    sys.exit(main())
