"""From folders of runs to a report: tables, pictures, and one HTML file that holds all of it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from vlfast.errors import VlfastError, unknown_name
from vlfast.report.figures import (
    plot_base_to_new,
    plot_calibration,
    plot_confusion,
    plot_few_shot_curves,
    plot_gains,
    plot_losses,
)
from vlfast.report.html import Picture, Section, page
from vlfast.report.provenance import provenance_of
from vlfast.report.sweeps import PARTS, PROTOCOLS, Collection, Sweep, collect_sweeps
from vlfast.report.table import Table, as_latex, as_markdown
from vlfast.report.tables import ece_table, sweep_table, table_name
from vlfast.report.worst import Worst, worst_of
from vlfast.trainers.files import replacing

FORMATS = ("md", "csv", "tex", "png", "html")

# Confusions are drawn for this many test sets; all are in the tables.
CONFUSIONS = 24

_PICTURES: tuple[tuple[str, Callable[[Sweep, Path], bool], str, str], ...] = (
    (
        "curves",
        plot_few_shot_curves,
        "Accuracy over shots",
        "Bands are the standard deviation over seeds; the dashed line from the star is zero-shot. "
        "Hollow points are over fewer seeds or datasets than the others.",
    ),
    (
        "bars",
        plot_base_to_new,
        "Base, new and harmonic mean",
        "Error bars are the standard deviation over seeds. Hatched bars with † are over fewer "
        "seeds or datasets than the others.",
    ),
    ("gains", plot_gains, "Gain over zero-shot", "In points, a bar a dataset, sorted."),
    (
        "losses",
        plot_losses,
        "Training loss",
        "The mean over seeds, its band from the lowest to the highest. Methods minimise different "
        "losses, so their heights are not comparable.",
    ),
    (
        "calibration",
        plot_calibration,
        "Calibration",
        "Accuracy over confidence in 15 bins of equal width, over the test images of all datasets "
        "and seeds together. Hatched is the gap to the dashed line of perfect calibration; grey "
        "bars below say how many images are in a bin.",
    ),
)


@dataclass(frozen=True)
class Report:
    """tables: those of the protocols, one a sweep. files: what was written. notes: what is left
    out, and what makes cells not comparable."""

    tables: tuple[Table, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def write_report(
    folders: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    published: bool = False,
    protocol: str | None = None,
    macro_f1: bool = False,
    formats: Sequence[str] = FORMATS,
) -> Report:
    """Read the finished runs below ``folders`` and write their report.

    output: its folder, by default "report" in the first of ``folders``. published: the papers'
    numbers below ours. protocol: one of ``PROTOCOLS`` alone. macro_f1: tables of it too, besides
    the HTML file, which has them always. formats: of md, csv, tex, png and html.

    Raises FileNotFoundError for a missing folder, VlfastError if there is no finished run or the
    output can't be written, UnknownNameError for an unknown protocol or format.
    """
    if protocol is not None and protocol not in PROTOCOLS:
        raise unknown_name("protocol", protocol, PROTOCOLS)
    for name in formats:
        if name not in FORMATS:
            raise unknown_name("format", name, FORMATS)
    if not folders:
        raise ValueError("folders: expected at least one, got none")
    roots = [Path(folder) for folder in folders]
    collection = collect_sweeps(roots, protocol)
    out = Path(output) if output is not None else roots[0] / "report"
    tables = [sweep_table(sweep, published=published) for sweep in collection.sweeps]
    f1 = [sweep_table(sweep, "macro_f1") for sweep in collection.sweeps]
    listed = [t for pair in zip(tables, f1, strict=True) for t in pair] if macro_f1 else tables
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = _write_lists(collection, listed, out, formats)
        if "png" in formats or "html" in formats:
            files += _write_pictures(collection, tables, f1, out, formats)
    except OSError as error:
        raise VlfastError(f"--output: can't write to {out} ({error.strerror})") from error
    return Report(tuple(listed), tuple(files), tuple(_notes(collection)))


def _write_lists(
    collection: Collection, tables: Sequence[Table], out: Path, formats: Sequence[str]
) -> list[Path]:
    files = []
    if "md" in formats:
        files.append(_write(out / "tables.md", "\n".join(map(as_markdown, tables))))
    if "tex" in formats:
        head = "% needs \\usepackage{booktabs}\n"
        files.append(_write(out / "tables.tex", head + "\n".join(map(as_latex, tables))))
    if "csv" in formats:
        files.append(_write_scores(collection, out / "results.csv"))
    return files


def _write_pictures(
    collection: Collection,
    tables: Sequence[Table],
    f1: Sequence[Table],
    out: Path,
    formats: Sequence[str],
) -> list[Path]:
    files: list[Path] = []
    with ExitStack() as stack:
        kept = "png" in formats
        folder = out if kept else Path(stack.enter_context(TemporaryDirectory()))
        sections = []
        for sweep, table, of_f1 in zip(collection.sweeps, tables, f1, strict=True):
            pictures = _draw(sweep, folder)
            worst = worst_of(sweep)
            confusions = _draw_confusions(sweep, worst, folder)
            if kept:
                files += [one.file for one in (*pictures, *confusions.values())]
            sections.append(
                Section(
                    sweep,
                    provenance_of(sweep),
                    table,
                    tuple(t for t in (of_f1, ece_table(sweep)) if t is not None),
                    tuple(pictures),
                    tuple(worst),
                    confusions,
                )
            )
        if "html" in formats:
            text = page(sections, notes=_notes(collection, warnings=False))
            files.append(_write(out / "report.html", text))
    return files


def _draw(sweep: Sweep, folder: Path) -> list[Picture]:
    pictures = []
    for name, plot, title, caption in _PICTURES:
        file = folder / f"{table_name(sweep)}-{name}.png"
        if plot(sweep, file):
            pictures.append(Picture(file, title, caption))
    return pictures


def _draw_confusions(sweep: Sweep, worst: Sequence[Worst], folder: Path) -> dict[str, Picture]:
    """By the titles of the test sets."""
    pictures = {}
    for one in worst[:CONFUSIONS]:
        test = one.test.replace("/", "-") + ("" if one.part == "test" else f"-{one.part}")
        file = folder / f"{table_name(sweep)}-confusion-{test}.png"
        title = f"{one.title}: what {sweep.label(one.method)} takes its worst classes for, %"
        plot_confusion(one.confusion, title, file)
        pictures[one.title] = Picture(file, title, "")
    return pictures


def _write_scores(collection: Collection, file: Path) -> Path:
    """The long form: a row a score."""
    # fmt: off
    header = ["protocol", "model", "method", "source", "dataset", "target", "shots", "seed", "part",
              "accuracy", "macro_f1", "images", "run"]
    # fmt: on
    with replacing(file) as aside, open(aside, "w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(header)
        for sweep in collection.sweeps:
            for run in sweep.runs:
                result, shots = run.result, run.method.shots_text
                about = [result.protocol, run.model, result.method, result.source, result.dataset]
                for test, of_test in result.scores.items():
                    for part in PARTS:
                        if part in of_test:
                            score = of_test[part]
                            numbers = [score["accuracy"], score["macro_f1"], score["images"]]
                            which = [test, shots, result.seed, part]
                            writer.writerow([*about, *which, *numbers, result.folder])
    return file


def _write(file: Path, text: str) -> Path:
    with replacing(file) as aside:
        aside.write_text(text, encoding="utf-8")
    return file


def _notes(collection: Collection, warnings: bool = True) -> list[str]:
    notes = list(collection.notes)
    if collection.unfinished:
        count = len(collection.unfinished)
        are = "1 run is" if count == 1 else f"{count} runs are"
        shown = ", ".join(map(str, collection.unfinished[:3])) + (", ..." if count > 3 else "")
        notes.append(f"{are} not finished and left out: {shown}")
    if warnings:
        for sweep in collection.sweeps:
            notes += [f"{sweep.name}: {text}" for text in provenance_of(sweep).warnings]
    return notes
