"""CoOp's split files: which image is in which split, with its label and its class name.

JSON, {"train": [[path, label, class name], ...], "val": [...], "test": [...]} ([CoOp]
datasets/oxford_pets.py, read_split).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from vlfast.data.listed import Listed
from vlfast.errors import VlfastError

OWN_SPLIT = "split.json"  # `vlfast data split` writes it in this form
PARTS = ("train", "val", "test")


def read_split_file(file: Path, images: str) -> tuple[dict[str, Listed], tuple[str, ...]]:
    """Train, val and test in the file's order, and the class names in label order.

    images: what the file's paths are relative to, below the dataset's folder; "" for the folder
    itself. The names are relative to the dataset's folder. Raises VlfastError for a file that is
    not of this form, whose labels have gaps or two names, or that has a class without a training
    image; OSError for one that can't be read. No image is looked for.
    """
    try:
        split = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        _refuse(file, f"it is not JSON ({error})")
    if not isinstance(split, dict) or not all(isinstance(split.get(part), list) for part in PARTS):
        _refuse(file, "expected the lists train, val and test")
    for part in PARTS:
        for number, row in enumerate(split[part]):
            if not _is_row(row):
                _refuse(file, f"expected [path, label, class name], got {row!r} ({part}, {number})")
            if row[0].startswith("/"):
                where = f"{file.parent / images}"
                _refuse(file, f"its paths are relative to {where}, got the absolute {row[0]!r}")
    classnames = _classnames(file, split)
    prefix = f"{images}/" if images else ""
    listed = {
        part: Listed.of((prefix + row[0] for row in split[part]), [row[1] for row in split[part]])
        for part in PARTS
    }
    return listed, classnames


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, list)
        and [type(value) for value in row] == [str, int, str]
        and row[0] != ""
        and row[1] >= 0
        and row[2].strip("_ ") != ""
    )


def _classnames(file: Path, split: dict[str, list[Any]]) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for part in PARTS:
        for path, label, name in split[part]:
            if names.setdefault(label, name) != name:
                _refuse(file, f"label {label} is {names[label]!r} and, at {path}, {name!r}")
    if not names:
        _refuse(file, "it lists no image")
    if gaps := sorted(set(range(max(names))) - set(names)):
        _refuse(file, f"labels run to {max(names)}, but none is {gaps[0]}")
    if missing := sorted(set(names) - {label for _, label, _ in split["train"]}):
        _refuse(file, f"no training image has label {missing[0]}, {names[missing[0]]!r}")
    return tuple(names[label] for label in sorted(names))


def _refuse(file: Path, why: str) -> NoReturn:
    remedy = "download it again (CoOp's DATASETS.md has the link)"
    if file.name == OWN_SPLIT:
        remedy = f"`vlfast data split {file.parent} --overwrite` draws it anew"
    raise VlfastError(f"data.root: {file} is no split file of CoOp's form: {why}; {remedy}")
