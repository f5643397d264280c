"""The papers' datasets from the folders that CoOp's DATASETS.md describes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from vlfast.data.coop.aircraft import read_aircraft
from vlfast.data.coop.few_shot_files import FewShotFiles
from vlfast.data.coop.imagenet import read_domain, read_imagenet, read_imagenetv2
from vlfast.data.coop.layouts import IMAGENET_DOMAINS, LAYOUTS, Layout
from vlfast.data.dataset import Dataset, Split
from vlfast.data.folder import FileImages
from vlfast.data.listed import Listed
from vlfast.data.split_file import read_split_file
from vlfast.data.templates import dataset_key, own_template
from vlfast.errors import VlfastError

# What CoOp's DATASETS.md calls those that it does not call by their titles.
_SECTIONS = {"oxford_flowers": "Flowers102", "dtd": "DTD"}
# How many images are looked for, besides one of every class.
_FIRST = 10


def load_coop(layout: Layout, root: str | Path) -> Dataset:
    """The dataset in ``root / layout.folder``, with CoOp's classes, splits and template.

    Class names are CoOp's, underscores and all; they become spaces where text is made of them. A
    split that the dataset lacks is empty: ImageNet's val (its validation images are the test
    split), and train and val of ImageNet's domains. Few-shot subsets are those that are stored in
    ``split_fewshot``, see ``vlfast.data.coop.few_shot_files``.

    Raises VlfastError that says what is missing or wrong, and where it belongs. A missing split
    file is never drawn anew. Images are looked for by samples, at least one a class and split.
    """
    folder = find_folder(layout, root)
    try:
        _check_complete(layout, folder)
        listed, classnames = read_listed(layout, folder)
        if layout.name not in ("imagenet", *IMAGENET_DOMAINS):
            _check_images(layout, folder, listed)
    except OSError as error:
        raise VlfastError(
            f"data.root: can't read {error.filename or folder} ({error.strerror or error})"
        ) from error
    splits = {
        part: _split(folder, listed.get(part, Listed.of([]))) for part in ("train", "val", "test")
    }
    return Dataset(
        name=layout.name,
        classnames=classnames,
        template=own_template(layout.name, "a photo of a {}."),
        few_shot_files=FewShotFiles(folder, layout.folder) if "train" in listed else None,
        **splits,
    )


def find_folder(layout: Layout, root: str | Path) -> Path:
    """``root / layout.folder``. VlfastError, with what the user may have meant, if there is none
    or it can't be read."""
    root = Path(root).expanduser()
    folder = root / layout.folder
    try:
        if folder.is_dir():
            with os.scandir(folder):
                return folder
        hint = _near_folder(layout, root)
    except OSError as error:
        raise VlfastError(
            f"data.root: can't read {error.filename or folder} ({error.strerror})"
        ) from error
    raise VlfastError(f"data.root: {layout.name} is read from {folder}, which is no folder; {hint}")


def _near_folder(layout: Layout, root: Path) -> str:
    if not root.is_dir():
        return f"there is no folder {root} either"
    if root.absolute().name == layout.folder:
        return f"data.root is the folder that holds {layout.folder}: {root.absolute().parent}"
    if layout.split_file is not None and (root / layout.split_file).exists():
        return (
            f"{root} itself seems to be the dataset: name it {layout.folder}, and let data.root be "
            "the folder that holds it"
        )
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    names = {dataset_key(name) for name in (layout.name, layout.title, layout.folder)}
    for entry in folders:
        if dataset_key(entry.name) in names:
            return f"rename {entry} to {layout.folder}, or link it under that name"
        if (entry / layout.folder).is_dir():
            return f"data.root is the folder that holds {layout.folder}: {entry}"
    return "data.root is the folder that holds the datasets' folders, as in CoOp's DATASETS.md"


def _check_complete(layout: Layout, folder: Path) -> None:
    for file in filter(None, (layout.split_file, *layout.needs)):
        if not (folder / file).is_file():
            raise VlfastError(f"data.root: there is no file {folder / file}; {remedy_of(layout)}")
    parts = ("train", "val") if layout.name == "imagenet" else ("",)
    for part in parts:
        images = folder / layout.images / part
        if not images.is_dir():
            found = sorted(e.name for e in folder.iterdir() if not e.name.startswith("."))
            raise VlfastError(
                f"data.root: there is no folder {images}, where the images of {layout.name} "
                f"belong; {folder} holds {', '.join(found[:6])}{', ...' * (len(found) > 6)}"
            )


def remedy_of(layout: Layout) -> str:
    """Where the files come from that the images do not bring along."""
    if layout.split_file is not None:
        return (
            f"CoOp's DATASETS.md, section {_SECTIONS.get(layout.name, layout.title)}, has the link "
            "(a split drawn anew would not be the papers', so none is)"
        )
    if layout.name in IMAGENET_DOMAINS:
        return f"it is a copy of {LAYOUTS['imagenet'].folder}/classnames.txt"
    if layout.name == "imagenet":
        return "CoOp's DATASETS.md, section ImageNet, has the link"
    return "it is in data/ of fgvc-aircraft-2013b.tar.gz"


def read_listed(layout: Layout, folder: Path) -> tuple[dict[str, Listed], tuple[str, ...]]:
    """Every image of every split that the dataset has, and the class names in label order; images
    that files name are not looked for."""
    if layout.split_file is not None:
        return read_split_file(folder / layout.split_file, layout.images)
    others = {
        "fgvc_aircraft": read_aircraft,
        "imagenet": read_imagenet,
        "imagenetv2": read_imagenetv2,
    }
    return others.get(layout.name, read_domain)(folder, layout.images)


def _check_images(layout: Layout, folder: Path, listed: dict[str, Listed]) -> None:
    """The first images and one of every class of every split are there."""
    for part, images in listed.items():
        first = [images.names[i] for i in range(min(_FIRST, len(images.names)))]
        for name in (*first, *images.one_per_class()):
            if not (folder / name).is_file():
                raise VlfastError(
                    f"data.root: {layout.split_file or f'images_variant_{part}.txt'} lists an "
                    f"image of {part} that is not there: {folder / name}; "
                    f"{where_it_is(layout, folder, name)}"
                )


def where_it_is(layout: Layout, folder: Path, name: str) -> str:
    """What to put right, where the image is found nearby."""
    images = folder / layout.images
    inner = name.removeprefix(f"{layout.images}/")
    parts = inner.split("/")
    if "\\" in inner:
        return f"paths have / between folders, got {inner!r}"
    for skipped in range(1, len(parts)):
        if (images / "/".join(parts[skipped:])).is_file():
            odd = "/".join(parts[:skipped])
            return f"it is there without {odd}/: the file's paths are relative to {images}"
    folders = [folder, *(entry for entry in sorted(images.iterdir()) if entry.is_dir())]
    for other in folders:
        if (other / inner).is_file():
            return f"it is {other / inner}: move the images in {other} to {images}"
    return f"the paths in it are relative to {images}; are all images unpacked there?"


def _split(folder: Path, listed: Listed) -> Split:
    source = FileImages(folder, listed.names)
    return Split(source, np.arange(len(listed.names)), listed.labels)
