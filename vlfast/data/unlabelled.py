"""Your own images without labels, for methods that learn from a teacher instead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlfast.data.dataset import UNKNOWN, Dataset, Split
from vlfast.data.folder import TEMPLATE, FileImages, first_missing, images_below
from vlfast.data.text_lines import read_lines
from vlfast.errors import VlfastError


def load_unlabelled(root: str | Path, classnames: Sequence[str], *, look: bool = True) -> Dataset:
    """Training images whose labels are unknown, and no others.

    root: a folder, whose images are taken wherever they lie in it, or a text file in UTF-8 that
    lists images, one path a line, absolute or relative to the file's folder. classnames: what they
    may show. look: whether (some of) the listed images are looked for. Raises VlfastError, or
    FileNotFoundError for a missing ``root``.
    """
    root = Path(root)
    if root.is_dir():
        folder, names = root, images_below(root, root)
        if not names:
            raise VlfastError(f"data.root: no images under {root}")
    elif root.is_file():
        folder, names = root.parent, _listed(root, look)
    else:
        raise FileNotFoundError(f"data.root: there is no folder or list of images {root}")
    source = FileImages(folder, names)
    nothing = Split(source, np.arange(0), np.arange(0))
    return Dataset(
        name="unlabelled",
        classnames=tuple(classnames),
        template=TEMPLATE,
        train=Split(source, np.arange(len(names)), np.full(len(names), UNKNOWN)),
        val=nothing,
        test=nothing,
    )


def _listed(file: Path, look: bool) -> list[str]:
    number_of: dict[str, int] = {}
    for number, name in read_lines(file):
        number_of.setdefault(name, number)
    names = list(number_of)
    if look and (missing := first_missing(file.parent, names)) is not None:
        raise VlfastError(
            f"data.root: line {number_of[missing]} of {file}: there is no image {missing!r}, "
            f"looked for in {file.parent}"
        )
    return names
