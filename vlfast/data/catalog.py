"""Datasets by name."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vlfast.data.coop.layouts import LAYOUTS, layout_of
from vlfast.data.dataset import Dataset
from vlfast.data.dictionary import read_classnames
from vlfast.errors import VlfastError, unknown_name

# What is given by a folder or file of the user's.
OWN = {
    "folder": "the folder of your images",
    "csv": "a CSV file of paths and labels, or the folder of train.csv and test.csv",
    "unlabelled": "the folder of your images, or a file that lists them",
}
_TORCHVISION = "torchvision/"


def dataset_names() -> list[str]:
    """Every name that ``load_dataset`` knows, and "torchvision/CLASS" for any class of
    torchvision.datasets."""
    from vlfast.data.glyphs import THEMES

    return [*(f"glyphs/{theme}" for theme in THEMES), *LAYOUTS, *OWN]


def canonical_name(name: str) -> str:
    """ "oxford_pets" for "OxfordPets"; other names as they are."""
    layout = layout_of(name)
    return name if layout is None else layout.name


def takes_classnames(name: str) -> bool:
    """Whether class names can be given for the dataset, which else has its own."""
    return name in ("csv", "unlabelled") or name.startswith(_TORCHVISION)


def load_dataset(
    name: str, root: str | None = None, classnames: str | Sequence[str] | None = None
) -> Dataset:
    """The whole dataset, every class and image.

    name: "glyphs/THEME"; one of the papers' (``vlfast.data.coop.layouts``), whose folder stands
    below ``root``; "torchvision/CLASS" with torchvision's ``root``; or your own images: "folder",
    "csv", "unlabelled". classnames: a file of class names, or the names, for images that come
    without.

    Raises UnknownNameError for an unknown name (with the nearest), VlfastError for what is missing.
    """
    name = canonical_name(name)
    if name not in dataset_names() and not name.startswith(_TORCHVISION):
        raise unknown_name("dataset", name, [*dataset_names(), f"{_TORCHVISION}CIFAR10"])
    of_torchvision = name.startswith(_TORCHVISION)
    if classnames is not None and not takes_classnames(name):
        raise VlfastError(f"data.classnames: {name} has class names of its own")
    if name.startswith("glyphs/"):
        from vlfast.data.glyphs import load_theme

        return load_theme(name.removeprefix("glyphs/"))
    if root is None:
        wanted = OWN.get(name, "the folder that it lies in")
        if name in LAYOUTS:
            wanted = f"the folder that holds {LAYOUTS[name].folder}"
        raise VlfastError(f"data.root: the dataset {name!r} needs {wanted}")
    root = os.path.expanduser(root)
    if name in LAYOUTS:
        from vlfast.data.coop.load import load_coop

        return load_coop(LAYOUTS[name], root)
    if isinstance(classnames, str):
        classnames = read_classnames(classnames)
    if of_torchvision:
        from vlfast.data.torchvision_data import load_torchvision

        return load_torchvision(name.removeprefix(_TORCHVISION), root, classnames)
    if name == "csv":
        from vlfast.data.csv_table import load_csv

        return load_csv(root, classnames)
    if name == "unlabelled":
        from vlfast.data.unlabelled import load_unlabelled

        if classnames is None:
            raise VlfastError(
                "data.classnames: images without labels need class names: give a file with one a "
                "line, or a dictionary to learn from (--data.dictionary, recipe kdpl-ca)"
            )
        return load_unlabelled(root, classnames)
    from vlfast.data.folder import load_folder

    return load_folder(root)
