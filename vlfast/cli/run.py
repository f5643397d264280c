"""`vlfast run`: carry out a protocol: recipes x datasets x seeds."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vlfast.cli.options import INTERRUPTED, config_options
from vlfast.errors import VlfastError

if TYPE_CHECKING:
    from vlfast.protocols.cells import Cell
    from vlfast.protocols.sweep import Outcome

HELP = "carry out a protocol of the papers: recipes x datasets x seeds"
UNFINISHED = 1  # a cell failed, or another process works at it

# The singular means the same.
_PLURAL = {"--recipe": "--recipes", "--dataset": "--datasets"}


def main(argv: list[str]) -> None:
    options = config_options(_plural(argv), "run", HELP, run_arguments)
    from vlfast.protocols.grids import SEEDS, Request, grid
    from vlfast.protocols.summary import summary_table
    from vlfast.protocols.sweep import choose, run_protocol, with_kept_features

    given = options["given"]
    output = given.pop("output", None)
    if output is None:
        raise VlfastError("--output: expected the folder that the runs go to")
    if not options["recipes"]:
        raise VlfastError("--recipes: expected at least one recipe, such as coop")
    asked = {
        "protocol": options["protocol"],
        "recipes": options["recipes"],
        "datasets": options["datasets"],
        "seeds": options["seeds"] or SEEDS,
        "shots": options["shots"],
        "source": options["source"],
    }
    numbers = options["cell"] and cell_numbers(options["cell"])
    if options["list"]:
        filled = with_kept_features(given, Path(output))
        request = Request(**asked, output=Path(output), options=filled)
        print(listing(choose(grid(request), numbers), as_json=bool(options["json"])))
        return
    if options["json"]:
        raise VlfastError("--json: goes with --list")
    with _stopped_by_signals():
        try:
            outcome = run_protocol(
                **asked,
                output=output,
                options=given,
                cells=numbers,
                jobs=options["jobs"],
                devices=options["devices"] or (),
                processes=options["processes"] or 1,
                skip_missing=bool(options["skip_missing"]),
                report=lambda line: print(line, flush=True),
            )
        except KeyboardInterrupt:
            command = shlex.join(["vlfast", "run", *argv])
            print(f"\nvlfast: stopped; go on with the same command: `{command}`", file=sys.stderr)
            sys.exit(INTERRUPTED)
    if outcome.done:
        print(f"\n{summary_table(options['protocol'], outcome.done)}")
        print(f"\nall tables and plots: vlfast report {shlex.quote(str(output))}")
    if _print_problems(outcome):
        sys.exit(UNFINISHED)


def run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "protocol", help="few-shot, base-to-new, cross-dataset or domain-generalization"
    )
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="see `vlfast recipes`")
    parser.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME",
        help="by default the papers'; all: the eleven; glyphs: all icon themes",
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="by default 1 2 3")
    parser.add_argument(
        "--shots",
        nargs="+",
        type=int,
        metavar="N",
        help="by default 1 2 4 8 16 in few-shot, else 16; all images (0) for promptkd",
    )
    parser.add_argument(
        "--source",
        metavar="NAME",
        help="what cross-dataset and domain-generalization train on, by default imagenet",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time, by default 1")
    parser.add_argument(
        "--devices", nargs="+", metavar="cuda:N", help="given to the runs in turn, one job for each"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="that train each run together (torchrun)"
    )
    parser.add_argument(
        "--cell", nargs="+", metavar="I", help="only these of --list: 4, or 3-7; for array jobs"
    )
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    parser.add_argument("--json", action="store_true", help="with --list: print JSON")
    parser.add_argument(
        "--skip-missing", action="store_true", help="go on without datasets that can't be read"
    )


def cell_numbers(words: Sequence[str]) -> list[int]:
    """[4, 7, 8, 9] of ["4", "7-9"]."""
    numbers: list[int] = []
    for word in words:
        first, dash, last = word.partition("-")
        if not (first.isdigit() and (last.isdigit() if dash else True)):
            raise VlfastError(f"--cell: expected numbers such as 4 or 3-7, got {word!r}")
        numbers += range(int(first), int(last if dash else first) + 1)
    if not numbers:
        raise VlfastError(f"--cell: expected at least one, got {' '.join(words)}")
    return numbers


def listing(cells: Sequence[Cell], *, as_json: bool) -> str:
    """The cells with their numbers and states."""
    from vlfast.evaluation.tables import text_table

    if as_json:
        return json.dumps([_about(cell) for cell in cells], indent=2)
    header = ["cell", "state", "dataset", "method", "shots", "seed", "tested on", "folder"]
    rows = []
    for cell in cells:
        about = _about(cell)
        others = len(about["targets"])
        drawn = [str(cell.shots or "all"), str(cell.seed)] if cell.trains else ["-", "-"]
        tested = f"itself, {others} others" if others else "itself"
        names = [str(cell.number), about["state"], cell.dataset, cell.method]
        rows.append([*names, *drawn, tested, str(cell.folder)])
    return text_table(header, rows)


def _about(cell: Cell) -> dict[str, Any]:
    return {
        "cell": cell.number,
        "state": cell.state(),
        "protocol": cell.protocol,
        "source": cell.source,
        "dataset": cell.dataset,
        "method": cell.method,
        "shots": cell.shots,
        "seed": cell.seed,
        "targets": [target.name for target in cell.targets],
        "folder": str(cell.folder),
    }


def _plural(argv: Sequence[str]) -> list[str]:
    words = []
    for word in argv:
        option, equals, value = word.partition("=")
        words.append(f"{_PLURAL.get(option, option)}{equals}{value}")
    return words


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """A cluster that ends a job, or a terminal that closes, stops as Ctrl-C does; under nohup a
    terminal may close."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_problems(outcome: Outcome) -> bool:
    """Say what was left out and what failed; whether anything that was asked for is not done."""
    for line in outcome.missing:
        print(f"left out: {line}", file=sys.stderr)
    for cell in outcome.busy:
        print(
            f"left to another process: {cell}; when that has ended, the same command goes on",
            file=sys.stderr,
        )
    for cell, reason in outcome.failed.items():
        print(f"failed: {cell}: {reason} (see {cell.folder / 'log.txt'})", file=sys.stderr)
    return bool(outcome.failed or outcome.busy)
