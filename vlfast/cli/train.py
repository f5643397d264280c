"""`vlfast train`: train a recipe and test it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import yaml

from vlfast.cli.options import INTERRUPTED, accuracy_lines, config_options, is_first_process
from vlfast.errors import VlfastError

if TYPE_CHECKING:
    from vlfast.run import Run

HELP = "train a recipe and test it"


def main(argv: list[str]) -> None:
    from vlfast.run import default_output, resume, train
    from vlfast.trainers.recipes import resolve_config

    options = config_options(argv, "train", HELP, train_arguments)
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
        print(result_lines(run.result))
        print(f"run: {run.folder.path}")
    processes.destroy_process_group()


def train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder")
    parser.add_argument(
        "--print_config", action="store_true", help="print the full config as YAML, and stop"
    )


def _stoppable(start: Callable[[Any], Run], what: Any, folder: str) -> Run:
    """Run ``start(what)``; Ctrl-C says how to go on."""
    try:
        return start(what)
    except KeyboardInterrupt:
        from vlfast.trainers.run_folder import RunFolder

        if not is_first_process():
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


def result_lines(result: dict[str, Any]) -> str:
    data = result["data"]
    trained = (
        f"{data['images']['train']} training images, {result['epochs']} epochs, "
        f"{result['train_seconds']:.1f} s"
        if result["epochs"]
        else "nothing trained"
    )
    head = f"{result['recipe']} on {data['name']}: {data['classes']} classes, {trained}"
    return f"{head}\n{accuracy_lines(result['accuracy'], result.get('best'))}"
