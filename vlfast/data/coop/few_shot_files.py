"""Few-shot subsets that are stored beside a dataset: CoOp's pickles, and JSON of our own.

``FOLDER/split_fewshot/shot_{shots}-seed_{seed}.pkl`` is what CoOp and all that stand on Dassl write
and read ([CoOp] datasets/oxford_pets.py:33-49): {"train": [Datum], "val": [Datum]}, ImageNet's
without "val". A pickle can run anything, so only Dassl's record of an image is admitted.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vlfast.data.dataset import Dataset, Split, hash_split
from vlfast.errors import VlfastError
from vlfast.restricted_pickle import RestrictedUnpickler, admit_only

FORMAT = "vlfast-few-shot-1"
_AWAY = "move it away, and the subset is drawn anew"


class Datum:
    """Stands for ``dassl.data.datasets.base_dataset.Datum`` ([Dassl] base_dataset.py:12-45), whose
    pickles set _impath, _label, _domain and _classname."""


@dataclass(frozen=True)
class _Entry:
    """An image of a stored subset. names: what it may be called below the dataset's folder."""

    names: tuple[str, ...]
    label: int
    classname: str | None = None


@dataclass(frozen=True)
class FewShotFiles:
    """The stored subsets of a dataset, of all its classes.

    folder: the dataset's. written_as: its name where CoOp's users have it; a pickle's paths are
    absolute on the machine that wrote them, and are read from this folder on.
    """

    folder: Path
    written_as: str

    def read(self, dataset: Dataset, shots: int, seed: int) -> tuple[Split, Split, str] | None:
        """Train, val and the file that says so: the pickle, else the JSON; None without either.

        Raises VlfastError for a file that is not of this form, holds anything but images of the
        dataset's splits with their labels, or another number of them.
        """
        stem = self.folder / "split_fewshot" / f"shot_{shots}-seed_{seed}"
        for suffix, read in ((".pkl", self._read_pickle), (".json", _read_json)):
            file = stem.with_name(stem.name + suffix)
            try:
                if not file.is_file():
                    continue
                entries = read(file, dataset)
            except OSError as error:
                raise VlfastError(f"few-shot: can't read {file} ({error.strerror})") from error
            train = _choose(file, "train", entries, dataset, shots)
            val = _choose(file, "val", entries, dataset, min(shots, 4))
            return train, val, str(file)
        return None

    def write(self, dataset: Dataset, shots: int, seed: int, train: Split, val: Split) -> None:
        """Store a subset of ``dataset`` as JSON. Where the folder can't be written to, nothing is
        lost: the same seed draws the same images."""
        content = {
            "format": FORMAT,
            "drawn_from": _hash(dataset),
            **{part: _rows(split) for part, split in (("train", train), ("val", val))},
        }
        file = self.folder / "split_fewshot" / f"shot_{shots}-seed_{seed}.json"
        aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
        try:
            file.parent.mkdir(exist_ok=True)
            try:
                aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
                os.replace(aside, file)
            finally:
                aside.unlink(missing_ok=True)
        except OSError:
            return

    def _read_pickle(self, file: Path, dataset: Dataset) -> dict[str, list[_Entry]]:
        admitted = admit_only({("dassl.data.datasets.base_dataset", "Datum"): Datum})
        with open(file, "rb") as opened:
            content = RestrictedUnpickler(opened, admitted, f"few-shot: {file}").load()
        if not isinstance(content, dict):
            _refuse(file, f"expected train and val, got {type(content).__name__}")
        return {
            part: [self._entry(file, datum) for datum in _list_in(file, content, part)]
            for part in _parts(dataset)
        }

    def _entry(self, file: Path, datum: Any) -> _Entry:
        kept = vars(datum) if isinstance(datum, Datum) else {}
        path, label = kept.get("_impath"), kept.get("_label")
        if not isinstance(path, str) or type(label) is not int:
            _refuse(file, f"expected Dassl's records of an image, got {kept or datum!r}")
        folders = path.replace("\\", "/").split("/")
        # The last folder of that name first: the data may lie in one of the same name.
        names = tuple(
            "/".join(folders[place + 1 :])
            for place in range(len(folders) - 2, -1, -1)
            if folders[place] == self.written_as
        )
        if not names:
            _refuse(file, f"expected a folder {self.written_as} in every path, got {path}")
        return _Entry(names, label, kept.get("_classname"))


def _read_json(file: Path, dataset: Dataset) -> dict[str, list[_Entry]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        _refuse(file, f"it is not JSON ({error})")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        _refuse(file, f"expected the format {FORMAT!r}")
    if content.get("drawn_from") != _hash(dataset):
        _refuse(file, f"it was drawn from other splits of {dataset.name} than are there now")
    entries = {}
    for part in _parts(dataset):
        rows = _list_in(file, content, part)
        for row in rows:
            if not isinstance(row, list) or [type(value) for value in row] != [str, int]:
                _refuse(file, f"expected [image, label], got {row!r}")
        entries[part] = [_Entry((name,), label) for name, label in rows]
    return entries


def _parts(dataset: Dataset) -> list[str]:
    """What a stored subset has: ImageNet's have no validation images."""
    return ["train", "val"] if len(dataset.val) else ["train"]


def _list_in(file: Path, content: dict[Any, Any], part: str) -> list[Any]:
    if not isinstance(content.get(part), list):
        _refuse(file, f"expected a list of {part} images, got {type(content.get(part)).__name__}")
    return content[part]


def _choose(
    file: Path, part: str, entries: dict[str, Sequence[_Entry]], dataset: Dataset, count: int
) -> Split:
    """The stored images of ``part`` in their order; ``count`` of a class, or all that it has."""
    split = dataset.splits()[part]
    if part not in entries:
        return split
    wanted = {name for entry in entries[part] for name in entry.names}
    position_of: dict[str, int] = {}
    for position, name in enumerate(split.image_keys()):
        if name in wanted:
            position_of.setdefault(name, position)
    chosen = []
    for entry in entries[part]:
        found = next((position_of[name] for name in entry.names if name in position_of), None)
        if found is None:
            _refuse(file, f"{entry.names[0]} is no {part} image of {dataset.name}'s split")
        if (label := int(split.labels[found])) != entry.label:
            _refuse(file, f"{entry.names[0]} has the label {entry.label} there, {label} here")
        chosen.append(found)
    subset = split.at(chosen)
    available = np.bincount(split.labels, minlength=dataset.num_classes)
    held = np.bincount(subset.labels, minlength=dataset.num_classes)
    expected = np.minimum(available, count)
    if len(wrong := np.flatnonzero(held != expected)):
        _refuse(
            file,
            f"expected {expected[wrong[0]]} {part} images of {dataset.classnames[wrong[0]]!r}, "
            f"got {held[wrong[0]]}",
        )
    _compare_names(file, entries[part], dataset)
    return subset


def _compare_names(file: Path, entries: Sequence[_Entry], dataset: Dataset) -> None:
    for entry in entries:
        here = dataset.classnames[entry.label]
        if entry.classname not in (None, here):
            warnings.warn(
                f"few-shot: {file} calls class {entry.label} {entry.classname!r}, and whoever "
                f"trains on it with Dassl does; here it is {here!r}, as the split says",
                stacklevel=5,
            )
            return


def _rows(split: Split) -> list[list[Any]]:
    return [list(row) for row in zip(split.image_keys(), split.labels.tolist(), strict=True)]


def _hash(dataset: Dataset) -> str:
    digest = hashlib.sha256(json.dumps(dataset.classnames).encode())
    for part in ("train", "val"):
        hash_split(digest, part, dataset.splits()[part])
    return digest.hexdigest()[:16]


def _refuse(file: Path, why: str) -> NoReturn:
    raise VlfastError(f"few-shot: {file} can't be used: {why}; {_AWAY}")
