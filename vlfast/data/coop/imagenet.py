"""ImageNet and its four domains: folders of images by class, and classnames.txt.

A label is the place of a class's folder among those present, sorted; in ImageNetV2 folder i is the
i-th line of classnames.txt ([CoOp] datasets/imagenet*.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vlfast.data.folder import IMAGE_SUFFIXES
from vlfast.data.listed import Listed
from vlfast.data.text_lines import read_lines
from vlfast.errors import VlfastError

_SUFFIXES = tuple(IMAGE_SUFFIXES)


def read_imagenet(folder: Path, images: str) -> tuple[dict[str, Listed], tuple[str, ...]]:
    """Train, and val as the test split; class names in label order.

    Images are sorted within a class, so that they are the same on every machine (CoOp's own draw
    depends on the order in which a file system lists them).
    """
    train, val = f"{images}/train", f"{images}/val"
    wnids, tested = _class_folders(folder / train), _class_folders(folder / val)
    if wnids != tested:
        odd = sorted(set(wnids) ^ set(tested))
        where, lacking = (train, val) if odd[0] in wnids else (val, train)
        raise VlfastError(
            f"data.root: {folder / where} has {odd[0]}, {folder / lacking} has not; expected the "
            "same class folders in both"
        )
    names = _names_of(folder, wnids)
    listed = {
        "train": _list_images(folder, train, wnids),
        "test": _list_images(folder, val, wnids),
    }
    return listed, names


def read_domain(folder: Path, images: str) -> tuple[dict[str, Listed], tuple[str, ...]]:
    """A test split alone, of the classes whose folders there are."""
    wnids = _class_folders(folder / images)
    return {"test": _list_images(folder, images, wnids)}, _names_of(folder, wnids)


def read_imagenetv2(folder: Path, images: str) -> tuple[dict[str, Listed], tuple[str, ...]]:
    """A test split alone; its folders are numbers, the lines of classnames.txt from 0."""
    names = tuple(read_classnames(folder / "classnames.txt").values())
    numbers = [str(i) for i in range(len(names))]
    if odd := sorted(set(_class_folders(folder / images)) ^ set(numbers)):
        what = "no folder" if odd[0] in numbers else "a folder"
        raise VlfastError(
            f"data.root: {folder / images} has {what} {odd[0]}; expected 0 to {len(names) - 1}, "
            f"one for each of the {len(names)} lines of classnames.txt"
        )
    return {"test": _list_images(folder, images, numbers)}, names


def read_classnames(file: Path) -> dict[str, str]:
    """Class names by folder (wnid), in the file's order."""
    names: dict[str, str] = {}
    for number, line in read_lines(file):
        wnid, _, name = line.partition(" ")
        if not name:
            raise VlfastError(
                f"data.root: line {number} of {file}: expected a folder's name and a class name, "
                f"such as 'n01440764 tench', got {line!r}"
            )
        if wnid in names:
            raise VlfastError(f"data.root: line {number} of {file}: {wnid} is there twice")
        names[wnid] = name
    return names


def _names_of(folder: Path, wnids: list[str]) -> tuple[str, ...]:
    file = folder / "classnames.txt"
    names = read_classnames(file)
    if unknown := [wnid for wnid in wnids if wnid not in names]:
        raise VlfastError(f"data.root: {file} has no line for the class folder {unknown[0]}")
    return tuple(names[wnid] for wnid in wnids)


def _class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; the README.txt of some is not one."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        found = sorted(entry.name for entry in visible if entry.is_dir())
    if not found:
        flat = sum(entry.name.lower().endswith(_SUFFIXES) for entry in visible)
        what = f"{flat} images, not sorted into class folders" if flat else "no class folders"
        raise VlfastError(f"data.root: {folder} has {what}; expected a folder a class (n01440764)")
    return found


def _list_images(folder: Path, images: str, classes: list[str]) -> Listed:
    """No file is looked at, for there may be a million: what has an image's suffix is one."""
    counts: list[int] = []

    def names() -> Iterator[str]:
        for name in classes:
            found = sorted(
                file
                for file in os.listdir(folder / images / name)
                if file.lower().endswith(_SUFFIXES) and not file.startswith(".")
            )
            counts.append(len(found))
            yield from (f"{images}/{name}/{file}" for file in found)

    listed = Listed.of(names())
    if not len(listed.names):
        raise VlfastError(f"data.root: no images under {folder / images}")
    return Listed(listed.names, np.repeat(np.arange(len(classes), dtype=np.int64), counts))
