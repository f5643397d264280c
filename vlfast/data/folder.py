"""Your own images: root/train/CLASS/*, root/test/CLASS/* and, if you have it, root/val/CLASS/*; or
root/CLASS/* with the root/split.json that `vlfast data split` wrote."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlfast.data.dataset import UNKNOWN, Dataset, Split
from vlfast.data.split_file import OWN_SPLIT, read_split_file
from vlfast.errors import VlfastError

TEMPLATE = "a photo of a {}."

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}


def open_image(path: str | Path) -> Image.Image:
    """The image in a file, RGB. Raises FileNotFoundError, or VlfastError if it can't be read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image: there is no file {path}")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VlfastError(
            f"image: {path} can't be read, it is corrupt or no image ({error})"
        ) from error


class FileImages:
    """An ImageSource over files, named relative to a root."""

    renders_views = False

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = root
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int, view: int | None = None) -> Image.Image:
        return open_image(self.root / self.names[index])

    def key(self, index: int) -> str:
        return self.names[index]


def images_below(folder: Path, root: Path) -> list[str]:
    """The image files in a folder and the folders in it, sorted, relative to ``root``; what begins
    with a dot is tools' own. Links to folders are followed, each folder is read once."""
    found, seen = [], set()
    for inner, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (place := os.path.realpath(inner)) in seen:
            folders.clear()
            continue
        seen.add(place)
        where = Path(inner).relative_to(root)
        found += [
            (where / file).as_posix()
            for file in files
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


def first_missing(root: Path, names: Sequence[str], most: int = 1000) -> str | None:
    """The first of ``names`` that is no file below ``root``, or None; of more than ``most`` only as
    many are looked for, evenly over all of them."""
    step = -(-len(names) // most) or 1
    looked_for = (names[i] for i in range(0, len(names), step))
    return next((name for name in looked_for if not (root / name).is_file()), None)


def classnames_of(folders: Sequence[str], where: Path) -> tuple[str, ...]:
    """Class names from those of folders: underscores become spaces. VlfastError where two become
    the same."""
    classnames = tuple(name.replace("_", " ") for name in folders)
    if twice := [name for name, count in Counter(classnames).items() if count > 1]:
        raise VlfastError(
            f"data.root: several folders of {where} stand for the class {twice[0]!r}, "
            "since underscores become spaces"
        )
    return classnames


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; those that begin with a dot are tools' own."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )


def load_folder(root: str | Path, *, look: bool = True) -> Dataset:
    """A dataset from folders named by class; underscores in their names become spaces.

    With root/split.json (``vlfast data split``) it says which images are for training. Else the
    classes are the folders of ``train``, sorted, and without ``val`` there is no validation split.
    A ``train`` that holds images and no folders has no labels; its classes are those of ``test``.
    look: whether (some of) the images that split.json names are looked for. Raises VlfastError
    saying what is missing.
    """
    root = Path(root)
    if (root / OWN_SPLIT).is_file():
        return _load_split(root, look)
    if not (root / "train").is_dir() and not (root / "test").is_dir():
        _refuse_unsplit(root)
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise VlfastError(f"data.root: expected a folder {root / part} with one folder a class")
    classes = class_folders(root / "train")
    unlabelled = not classes and bool(images_below(root / "train", root))
    if unlabelled:
        classes = class_folders(root / "test")
    if not classes:
        where = root / ("test" if unlabelled else "train")
        raise VlfastError(f"data.root: {where} has no class folders")
    classnames = classnames_of(classes, root / ("test" if unlabelled else "train"))

    names: list[str] = []
    splits = {}
    for part in ("train", "val", "test"):
        first = len(names)
        labels: list[int] = []
        folder = root / part
        if part == "train" and unlabelled:
            names += images_below(folder, root)
            labels += [UNKNOWN] * (len(names) - first)
        elif folder.is_dir():
            if extra := set(class_folders(folder)) - set(classes):
                raise VlfastError(
                    f"data.root: {folder} has classes that train lacks: {', '.join(sorted(extra))}"
                )
            for label, name in enumerate(classes):
                found = images_below(folder / name, root)
                names += found
                labels += [label] * len(found)
        splits[part] = (np.arange(first, len(names)), np.array(labels, dtype=np.int64))

    for part in ("train", "test"):
        if not len(splits[part][0]):
            raise VlfastError(f"data.root: no images under {root / part}")
    source = FileImages(root, names)
    return Dataset(
        name="folder",
        classnames=classnames,
        template=TEMPLATE,
        **{part: Split(source, *found) for part, found in splits.items()},
    )


def _refuse_unsplit(root: Path) -> None:
    """Raise VlfastError for class folders that nothing has split yet."""
    if root.is_dir() and any(images_below(root / name, root) for name in class_folders(root)):
        raise VlfastError(
            f"data.root: {root} has class folders, but nothing says which images are for training; "
            f"`vlfast data split {root} --test 0.2 --val 0.1 --seed 1` draws them once and for all"
        )


def _load_split(root: Path, look: bool) -> Dataset:
    listed, classnames = read_split_file(root / OWN_SPLIT, "")
    if not len(listed["test"].names):
        raise VlfastError(f"data.root: {root / OWN_SPLIT} names no test image")
    splits = {}
    for part, images in listed.items():
        if look and (missing := first_missing(root, images.names)) is not None:
            raise VlfastError(
                f"data.root: {root / OWN_SPLIT} names {missing}, which is not in {root}; "
                f"`vlfast data check folder --root {root}` lists all that are missing"
            )
        source = FileImages(root, images.names)
        splits[part] = Split(source, np.arange(len(images.names)), images.labels)
    return Dataset(name="folder", classnames=classnames, template=TEMPLATE, **splits)
