"""A user's files of names: a dictionary that class-agnostic distillation chooses from, and class
names for images that come without."""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path

from vlfast.errors import VlfastError

# KDPL-CA's text for every name, the teacher's and the frozen student's ([KDPL] kdpl_utils.py:68).
DICTIONARY_TEMPLATE = "a photo of a {}."


def read_dictionary(path: str | Path) -> tuple[str, ...]:
    """The names of a file in UTF-8, in its order: one a line, or a .csv file with a header and one
    column.

    Names that are there already are left out, with a warning. Raises FileNotFoundError for a
    missing file; VlfastError for another encoding, a blank line, a row of several columns or fewer
    than two names, naming the line.
    """
    names: dict[str, int] = {}
    repeated = []
    for number, name in read_names(path, "data.dictionary"):
        if name in names:
            repeated.append(f"{name!r} (lines {names[name]} and {number})")
        else:
            names[name] = number
    if len(names) < 2:
        raise VlfastError(
            f"data.dictionary: expected at least two names to choose from, {path} holds "
            f"{len(names)}"
        )
    if repeated:
        warnings.warn(
            f"data.dictionary: {path} holds {len(repeated)} names twice, which count once: "
            f"{', '.join(repeated[:3])}{', ...' if len(repeated) > 3 else ''}",
            stacklevel=2,
        )
    return tuple(names)


def read_classnames(path: str | Path) -> tuple[str, ...]:
    """The class names of a file, in label order: one a line, or a .csv file as a dictionary's.

    Two classes may share a name, as in ImageNet. Raises as ``read_dictionary`` does.
    """
    names = tuple(name for _, name in read_names(path, "data.classnames"))
    if not names:
        raise VlfastError(f"data.classnames: {path} holds no class name")
    return names


def read_names(path: str | Path, option: str) -> list[tuple[int, str]]:
    """The lines of a file of names and the names on them. option: what the file was given as."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise VlfastError(f"{option}: {path} is not UTF-8 ({error})") from error
    rows = _csv_rows(text, path, option) if path.suffix.lower() == ".csv" else _lines(text)
    names = [(number, row.strip()) for number, row in rows]
    for number, name in names:
        if not name.replace("_", "").strip():
            raise VlfastError(f"{option}: line {number} of {path} is blank, expected a name")
    return names


def _lines(text: str) -> list[tuple[int, str]]:
    # Not splitlines(), which also splits where a name holds a rarer separator.
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return list(enumerate(lines, start=1))


def _csv_rows(text: str, path: Path, option: str) -> list[tuple[int, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if len(row) > 1:
                raise VlfastError(
                    f"{option}: line {reader.line_num} of {path} has {len(row)} columns, "
                    "expected one (a name with a comma stands in quotes)"
                )
            rows.append((reader.line_num, row[0] if row else ""))
    except csv.Error as error:
        raise VlfastError(
            f"{option}: line {reader.line_num} of {path} is not CSV ({error})"
        ) from error
    return rows[1:]
