"""`vlfast data`: which datasets there are, what is wrong with them, and how to get them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlfast.cli.options import Parser

if TYPE_CHECKING:
    from vlfast.data.check import OnImages, Report

HELP = "list, check, fetch and split datasets"

_CORRUPT_SHOWN = 10


def main(argv: list[str]) -> None:
    parser = Parser("vlfast data", description=HELP)
    actions = parser.add_subparsers(dest="action", required=True, parser_class=Parser)

    listing = actions.add_parser("list", help="the datasets, and which of them are there")
    listing.add_argument("--root", help="the folder that holds the papers' datasets")

    checking = actions.add_parser(
        "check", help="what is there and what is missing, where it belongs, broken images"
    )
    checking.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="one of the papers' datasets, all by default; or folder, csv, unlabelled, "
        "torchvision/CLASS",
    )
    checking.add_argument("--root", required=True, help="the folder that holds the datasets")
    checking.add_argument(
        "--classnames", help="a file of class names, for csv, unlabelled, torchvision"
    )
    checking.add_argument("--quick", action="store_true", help="do not decode the images")
    checking.add_argument("--jobs", type=int, help="processes that decode, one a core by default")
    checking.add_argument("--json", action="store_true", help="print JSON")

    preparing = actions.add_parser("prepare", help="download what torchvision can fetch")
    preparing.add_argument("name", metavar="NAME", help="a dataset, or torchvision/CLASS")
    preparing.add_argument("--root", required=True, help="the folder that it goes to")

    splitting = actions.add_parser(
        "split", help="draw test and validation images of ROOT/CLASS/*, once"
    )
    splitting.add_argument("root", metavar="ROOT", help="the folder of the class folders")
    splitting.add_argument("--test", type=float, default=0.2, help="share of test images, 0.2")
    splitting.add_argument("--val", type=float, default=0.1, help="of validation images, 0.1")
    splitting.add_argument("--seed", type=int, default=1)
    splitting.add_argument("--overwrite", action="store_true", help="replace a split that is there")

    options = parser.parse_args(argv)
    {"list": _list, "check": _check, "prepare": _prepare, "split": _split}[options.action](options)


def _list(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from vlfast.data.catalog import OWN, dataset_names
    from vlfast.data.coop.layouts import LAYOUTS
    from vlfast.data.templates import TEMPLATES, dataset_key

    table = Table("name", "classes", "template", *(["there"] if options.root else []))
    for name, layout in LAYOUTS.items():
        row = [name, str(layout.counts.classes), TEMPLATES[dataset_key(layout.title)]]
        if options.root:
            folder = Path(options.root).expanduser() / layout.folder
            row.append("yes" if folder.is_dir() else f"no folder {layout.folder}")
        table.add_row(*row)
    Console().print(table)
    drawn = [name for name in dataset_names() if name.startswith("glyphs/")]
    print(f"\ndrawn, no files needed: {', '.join(drawn)}")
    print("torchvision/CLASS: a class of torchvision.datasets, as torchvision/CIFAR10")
    for name, what in OWN.items():
        print(f"{name}: --data.root is {what}")


def _check(options: argparse.Namespace) -> None:
    from vlfast.data.catalog import takes_classnames
    from vlfast.data.check import check_dataset, names_to_check
    from vlfast.errors import VlfastError

    if options.jobs is not None and options.jobs < 1:
        raise VlfastError(f"--jobs: expected at least 1, got {options.jobs}")
    names = names_to_check(options.names)
    own = [name for name in names if not takes_classnames(name)]
    if options.classnames is not None and own:
        raise VlfastError(f"--classnames: {own[0]} has class names of its own")
    root = Path(options.root).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"--root: there is no folder {root}")
    reports = []
    for name in names:
        with _progress(name) as on_images:
            reports.append(
                check_dataset(
                    name,
                    root,
                    classnames=options.classnames,
                    decode=not options.quick,
                    jobs=options.jobs,
                    on_images=on_images,
                )
            )
    if options.json:
        found = {"root": str(root), "datasets": [report.as_json() for report in reports]}
        print(json.dumps(found, indent=2))
    else:
        print(report_text(reports, asked=bool(options.names)))
    # What nobody asked for by name may be missing.
    good = ("complete",) if options.names else ("complete", "missing")
    if any(report.state not in good for report in reports):
        sys.exit(1)


def _prepare(options: argparse.Namespace) -> None:
    from vlfast.data.check import check_dataset
    from vlfast.data.coop.layouts import layout_of
    from vlfast.data.prepare import prepare

    print(f"data: {prepare(options.name, options.root)}")
    if layout_of(options.name) is not None:
        print(report_text([check_dataset(options.name, options.root, decode=False)], asked=True))


def _split(options: argparse.Namespace) -> None:
    from vlfast.data.split_folder import split_folder

    counts = split_folder(
        options.root,
        test=options.test,
        val=options.val,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    images = ", ".join(f"{count} {part}" for part, count in counts.items())
    print(f"split: {Path(options.root) / 'split.json'} ({images} images)")


def report_text(reports: Sequence[Report], *, asked: bool) -> str:
    """A table, and below it what is wrong with each; where datasets are missing that nobody
    ``asked`` for, one line names them."""
    from vlfast.evaluation.tables import text_table

    absent = [] if asked else [report for report in reports if report.state == "missing"]
    present = [report for report in reports if report not in absent]
    lines = []
    if present:
        header = ["dataset", "state", "classes", "train", "val", "test", "base", "new"]
        header += ["decoded", "few-shot"]
        lines.append(text_table(header, [_row(report) for report in present]))
    for report in present:
        if report.problems or report.corrupt:
            lines.append(f"\n{report.title} ({report.folder}):")
            lines += [f"  - {problem}" for problem in report.problems]
            lines += _corrupt_lines(report)
    if absent:
        folders = ", ".join(f"{report.title} ({Path(report.folder).name})" for report in absent)
        lines.append(f"\nnot there: {folders}; name one to see what to put where")
    return "\n".join(lines).strip("\n")


def _row(report: Report) -> list[str]:
    found = report.found()
    cells = [
        _cell(found.get(name), report.expected.get(name))
        for name in ("classes", "train", "val", "test", "base_test", "new_test")
    ]
    decoded = f"{report.decoded:,}" if report.decoded else "-"
    return [report.name, report.state, *cells, decoded, str(len(report.few_shot) or "-")]


def _cell(found: int | None, expected: int | None) -> str:
    if found is None:
        return "-" if expected is None else f"-/{expected:,}"
    return f"{found:,}" if expected in (None, found) else f"{found:,}/{expected:,}"


def _corrupt_lines(report: Report) -> list[str]:
    if not report.corrupt:
        return []
    lines = [f"  - images that can't be decoded, to unpack or fetch again: {len(report.corrupt):,}"]
    shown = list(report.corrupt.items())[:_CORRUPT_SHOWN]
    lines += [f"      {name}: {fault}" for name, fault in shown]
    if len(report.corrupt) > len(shown):
        lines.append(f"      and {len(report.corrupt) - len(shown):,} more (--json lists all)")
    return lines


@contextmanager
def _progress(name: str) -> Iterator[OnImages]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
