"""A split of images in JSON, in the form of CoOp's split files: {"train": [[path, label, name]]}."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlfast.errors import VlfastError

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class SplitRows:
    """classnames: in label order. rows: (path, label) by "train", "val" and "test"."""

    classnames: tuple[str, ...]
    rows: Mapping[str, Sequence[tuple[str, int]]]


def read_split(file: Path) -> SplitRows:
    """Raises VlfastError, saying what is wrong, for a file that is damaged or of another form."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VlfastError(f"split: {file} is damaged ({error})") from error
    if not isinstance(found, dict) or {"train", "test"} - found.keys():
        raise VlfastError(f"split: expected lists train, val and test in {file}")
    name_of: dict[int, str] = {}
    rows: dict[str, list[tuple[str, int]]] = {}
    for part in PARTS:
        rows[part] = []
        for number, row in enumerate(found.get(part, []), start=1):
            if not _is_row(row):
                raise VlfastError(
                    f"split: {part} entry {number} of {file}: expected [path, label, class name], "
                    f"got {row!r}"
                )
            path, label, name = row
            if name_of.setdefault(label, name) != name:
                raise VlfastError(
                    f"split: {file} calls class {label} both {name_of[label]!r} and {name!r}"
                )
            rows[part].append((path, label))
    if not rows["train"] or not rows["test"]:
        empty = "train" if not rows["train"] else "test"
        raise VlfastError(f"split: {file} names no image for {empty}")
    if sorted(name_of) != list(range(len(name_of))):
        raise VlfastError(
            f"split: expected labels from 0 to {len(name_of) - 1} for {len(name_of)} classes in "
            f"{file}, got {min(name_of)} to {max(name_of)}"
        )
    return SplitRows(tuple(name_of[label] for label in range(len(name_of))), rows)


def _is_row(row: object) -> bool:
    if not isinstance(row, list) or len(row) != 3:
        return False
    path, label, name = row
    return (
        isinstance(path, str)
        and isinstance(label, int)
        and not isinstance(label, bool)
        and isinstance(name, str)
    )
