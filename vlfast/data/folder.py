"""Your own images: root/train/CLASS/*, root/test/CLASS/* and, if you have it, root/val/CLASS/*."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlfast.data.dataset import Dataset, Split
from vlfast.errors import VlfastError

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


def load_folder(root: str | Path) -> Dataset:
    """A dataset from folders named by class; underscores in their names become spaces.

    The classes are the folders of ``train``, sorted. Without ``val`` there is no validation split.
    Raises VlfastError saying what is missing.
    """
    root = Path(root)
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise VlfastError(f"data.root: expected a folder {root / part} with one folder a class")
    classes = sorted(_class_folders(root / "train"))
    if not classes:
        raise VlfastError(f"data.root: {root / 'train'} has no class folders")

    classnames = tuple(name.replace("_", " ") for name in classes)
    if twice := [name for name, count in Counter(classnames).items() if count > 1]:
        raise VlfastError(
            f"data.root: several folders of {root / 'train'} stand for the class {twice[0]!r}, "
            "since underscores become spaces"
        )

    names: list[str] = []
    splits = {}
    for part in ("train", "val", "test"):
        first = len(names)
        labels: list[int] = []
        folder = root / part
        if folder.is_dir():
            if extra := _class_folders(folder) - set(classes):
                raise VlfastError(
                    f"data.root: {folder} has classes that train lacks: {', '.join(sorted(extra))}"
                )
            for label, name in enumerate(classes):
                found = sorted(
                    path.relative_to(root).as_posix()
                    for path in (folder / name).rglob("*")
                    if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
                )
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
        template="a photo of a {}.",
        **{part: Split(source, *found) for part, found in splits.items()},
    )


def _class_folders(folder: Path) -> set[str]:
    """Names of the folders in a folder; those that begin with a dot are tools' own."""
    return {
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    }
