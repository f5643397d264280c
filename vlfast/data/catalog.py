"""Datasets by name."""

from __future__ import annotations

from vlfast.data.dataset import Dataset
from vlfast.data.folder import load_folder
from vlfast.errors import VlfastError, unknown_name


def dataset_names() -> list[str]:
    """Every name that ``load_dataset`` knows."""
    from vlfast.data.glyphs import THEMES

    return [*(f"glyphs/{theme}" for theme in THEMES), "folder"]


def load_dataset(name: str, root: str | None = None) -> Dataset:
    """The whole dataset, every class and image: "glyphs/THEME", or "folder" with its ``root``.

    Raises UnknownNameError for an unknown name (with the nearest), VlfastError for what is missing.
    """
    if name not in dataset_names():
        raise unknown_name("dataset", name, dataset_names())
    if name == "folder":
        if root is None:
            raise VlfastError('data.root: the dataset "folder" needs the folder of your images')
        return load_folder(root)
    from vlfast.data.glyphs import load_theme

    return load_theme(name.removeprefix("glyphs/"))
