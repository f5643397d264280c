"""Your own images by a table: CSV files of path,label."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlfast.data.dataset import Dataset, Split
from vlfast.data.folder import TEMPLATE, FileImages, first_missing
from vlfast.errors import VlfastError

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class _Row:
    """file and line say where it stands."""

    path: str
    label: str
    part: str
    file: Path
    line: int

    @property
    def where(self) -> str:
        return f"line {self.line} of {self.file}"


def load_csv(
    root: str | Path, classnames: Sequence[str] | None = None, *, look: bool = True
) -> Dataset:
    """A dataset from tables in UTF-8 with a header, its columns in any order.

    root: a folder with train.csv, test.csv and, if you have it, val.csv (columns path and label),
    or one .csv with a third column, split (train, val or test). Paths are absolute or relative to
    the table's folder. Labels are class names, or integers that count ``classnames`` from 0.
    Without ``classnames`` the classes are the names that occur, sorted. look: whether (some
    of) the images are looked for. Raises VlfastError naming the line, or FileNotFoundError.
    """
    root = Path(root)
    if root.is_dir():
        folder = root
        rows = []
        for part in PARTS:
            if (root / f"{part}.csv").is_file():
                rows += _read(root / f"{part}.csv", part)
            elif part != "val":
                raise FileNotFoundError(f"data.root: there is no file {root / f'{part}.csv'}")
    elif root.is_file():
        folder = root.parent
        rows = _read(root, None)
    else:
        raise FileNotFoundError(f"data.root: there is no folder or .csv file {root}")
    for part in ("train", "test"):
        if not any(row.part == part for row in rows):
            raise VlfastError(f"data.root: {root} has no row for {part}")
    names = tuple(classnames) if classnames is not None else _names_in(rows)
    labels = _labels(rows, names)
    paths = [row.path for row in rows]
    if look and (missing := first_missing(folder, paths)) is not None:
        where = rows[paths.index(missing)].where
        raise VlfastError(
            f"data.root: {where}: there is no image {missing!r}, looked for in {folder}"
        )
    source = FileImages(folder, paths)
    splits = {}
    for part in PARTS:
        indices = np.array([i for i, row in enumerate(rows) if row.part == part], dtype=np.int64)
        splits[part] = Split(source, indices, labels[indices])
    return Dataset(name="csv", classnames=names, template=TEMPLATE, **splits)


def _read(file: Path, part: str | None) -> list[_Row]:
    """part: of all rows; None where the column split says it."""
    wanted = ["path", "label"] if part else ["path", "label", "split"]
    rows = []
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, strict=True, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            if missing := [name for name in wanted if name not in header]:
                raise VlfastError(
                    f"data.root: {file} has no column {missing[0]}, expected a header with "
                    f"{', '.join(wanted)}, got {', '.join(header) or 'an empty file'}"
                )
            for row in reader:
                values = {name: (row[name] or "").strip() for name in wanted}
                if empty := [name for name, value in values.items() if not value]:
                    raise VlfastError(
                        f"data.root: line {reader.line_num} of {file} has no {empty[0]}"
                    )
                of_row = part or values["split"].lower()
                if of_row not in PARTS:
                    raise VlfastError(
                        f"data.root: line {reader.line_num} of {file}: expected split "
                        f"{', '.join(PARTS)}, got {values['split']!r}"
                    )
                rows.append(_Row(values["path"], values["label"], of_row, file, reader.line_num))
    except UnicodeDecodeError as error:
        raise VlfastError(f"data.root: {file} is not UTF-8 ({error})") from error
    except csv.Error as error:
        raise VlfastError(f"data.root: {file} is not CSV ({error})") from error
    return rows


def _is_integer(label: str) -> bool:
    return label.removeprefix("-").isdecimal() and label.isascii()


def _is_number(label: str) -> bool:
    """Also 2.0, as pandas writes integers where a column once lacked some."""
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _names_in(rows: Sequence[_Row]) -> tuple[str, ...]:
    if all(_is_number(row.label) for row in rows):
        raise VlfastError(
            f"data.classnames: the labels of {rows[0].file} are numbers, which name no class: give "
            "a file with one class name a line, the first for 0"
        )
    return tuple(sorted({row.label for row in rows}))


def _labels(rows: Sequence[_Row], names: tuple[str, ...]) -> np.ndarray:
    """int64 [N]. Names win over numbers where a class is called by a number."""
    label_of: dict[str, int] = {}
    for label, name in enumerate(names):
        label_of.setdefault(name, label)
    labels = []
    for row in rows:
        label = label_of.get(row.label)
        if label is None and _is_integer(row.label):
            label = int(row.label)
            if not 0 <= label < len(names):
                raise VlfastError(
                    f"data.root: {row.where}: expected a label from 0 to {len(names) - 1} "
                    f"({len(names)} class names), got {row.label}"
                )
        if label is None:
            raise VlfastError(
                f"data.root: {row.where}: {row.label!r} is not among the {len(names)} class names "
                f"({', '.join(map(repr, names[:3]))}{', ...' * (len(names) > 3)})"
            )
        labels.append(label)
    return np.array(labels, dtype=np.int64)
