"""Any classification dataset of torchvision.datasets that has a training and a test split."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from vlfast.data.dataset import Dataset, Split
from vlfast.data.templates import own_template
from vlfast.errors import VlfastError, unknown_name

# What torchvision calls a dataset that has a template under another name.
_TEMPLATE_OF = {"OxfordIIITPet": "OxfordPets", "Flowers102": "OxfordFlowers"}

# How its classes call their splits; the first that a class knows. A class without a test split is
# tested on its validation images, as ImageNet is.
_SPLITS = {
    "train": ("train", "trainval", "train-standard"),
    "val": ("val", "valid"),
    "test": ("test",),
}

# Where its classes keep labels, or (image, label) pairs, without decoding an image.
_LABELS = ("targets", "labels", "_labels", "y")
_PAIRS = ("_samples", "samples")


class TorchvisionImages:
    """An ImageSource over datasets of torchvision, by split, one after the other."""

    renders_views = False

    def __init__(self, name: str, parts: dict[str, Any]) -> None:
        self.name = name
        self._items = [(part, data, i) for part, data in parts.items() for i in range(len(data))]

    def __len__(self) -> int:
        return len(self._items)

    def load(self, index: int, view: int | None = None) -> Image.Image:
        part, data, item = self._items[index]
        try:
            image = data[item][0]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise VlfastError(
                f"image: {part} image {item} of {self.name} can't be read ({error})"
            ) from error
        if not isinstance(image, Image.Image):
            raise VlfastError(
                f"data.name: {self.name} gives {type(image).__name__} where images were expected"
            )
        return image.convert("RGB")

    def key(self, index: int) -> str:
        part, _, item = self._items[index]
        return f"{part}/{item}"


def load_torchvision(
    cls: str, root: str | Path, classnames: Sequence[str] | None = None
) -> Dataset:
    """The dataset of the class ``cls`` of torchvision.datasets, which lies in ``root`` as
    torchvision has it; nothing is downloaded.

    classnames: for classes that have none (SVHN); they replace those of others. Underscores in
    names become spaces. Raises UnknownNameError for what torchvision has no class for, VlfastError
    for one that is no classification dataset with a test split, or is not in ``root``.
    """
    name = f"torchvision/{cls}"
    parts = _open_splits(cls, root)
    labels = {part: _labels(data, name) for part, data in parts.items()}
    if classnames is None:
        classnames = _classnames(parts["train"], name)
    highest = max(int(found.max(initial=-1)) for found in labels.values())
    if highest >= len(classnames):
        raise VlfastError(
            f"data.classnames: {name} has labels up to {highest}, but there are "
            f"{len(classnames)} class names"
        )
    source = TorchvisionImages(name, parts)
    splits, first = {}, 0
    for part in ("train", "val", "test"):
        found = labels.get(part, np.empty(0, dtype=np.int64))
        splits[part] = Split(source, np.arange(first, first + len(found)), found)
        first += len(found)
    return Dataset(
        name=name,
        classnames=tuple(classnames),
        template=own_template(_TEMPLATE_OF.get(cls, cls), "a photo of a {}."),
        **splits,
    )


def torchvision_class(cls: str, *, split: bool = True) -> Callable[..., Any]:
    """The class of that name. split: whether it must have training and test images apart.

    Raises UnknownNameError, or VlfastError for one that takes other arguments than a root and a
    split.
    """
    if cls not in datasets.__all__:
        raise unknown_name("dataset", f"torchvision/{cls}", _usable())
    found = getattr(datasets, cls)
    if needed := _needed(found):
        raise VlfastError(
            f"data.name: torchvision/{cls} needs {', '.join(needed)}, which vlfast can't know; "
            "write its images into folders (--data folder) or a table (--data csv)"
        )
    if split and not _takes_split(found):
        raise VlfastError(
            f"data.name: torchvision/{cls} has no training and test split; put its images into "
            "folders by class, and `vlfast data split` draws one for --data folder"
        )
    return found


def split_arguments(cls: str) -> dict[str, list[dict[str, Any]]]:
    """By "train", "val" and "test": the keyword arguments that may stand for it, best first."""
    if "train" in inspect.signature(torchvision_class(cls)).parameters:
        return {"train": [{"train": True}], "test": [{"train": False}]}
    return {part: [{"split": s} for s in names] for part, names in _SPLITS.items()}


def _open_splits(cls: str, root: str | Path) -> dict[str, Any]:
    make, parts = torchvision_class(cls), {}
    for part, arguments in split_arguments(cls).items():
        for given in arguments:
            try:
                parts[part] = make(str(root), **given)
                break
            except ValueError:
                continue  # it has no split of that name
            except ImportError as error:
                raise VlfastError(
                    f"data.name: torchvision/{cls} needs the package {error.name}: pip install "
                    f"{error.name}"
                ) from error
            except (RuntimeError, OSError) as error:
                raise VlfastError(
                    f"data.root: torchvision/{cls} is not in {root}, or not whole; `vlfast data "
                    f"prepare torchvision/{cls} --root {root}` fetches it ({_first_line(error)})"
                ) from error
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    if missing := {"train", "test"} - parts.keys():
        raise VlfastError(f"data.name: torchvision/{cls} has no split for {min(missing)}")
    return parts


def _labels(data: Any, name: str) -> np.ndarray:
    """int64 [N]. Images are decoded only where the class keeps its labels nowhere else."""
    found: Any = None
    for attribute in _LABELS:
        if len(getattr(data, attribute, ())) == len(data):
            found = getattr(data, attribute)
            break
    else:
        for attribute in _PAIRS:
            if len(getattr(data, attribute, ())) == len(data):
                found = [pair[1] for pair in getattr(data, attribute)]
                break
        else:
            found = [data[i][1] for i in range(len(data))]
    labels = np.asarray(found)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise VlfastError(
            f"data.name: {name} has no class for every image, so nothing can be classified"
        )
    return labels.astype(np.int64)


def _classnames(data: Any, name: str) -> tuple[str, ...]:
    found = getattr(data, "classes", None)
    if not found:
        raise VlfastError(
            f"data.classnames: {name} has no class names of its own: give a file with one a line, "
            "in the order of its labels"
        )
    # ImageNet's are tuples of synonyms.
    first = [entry if isinstance(entry, str) else entry[0] for entry in found]
    return tuple(entry.replace("_", " ") for entry in first)


def _usable() -> list[str]:
    classes = {name: getattr(datasets, name) for name in datasets.__all__}
    return [
        f"torchvision/{name}"
        for name, found in classes.items()
        if inspect.isclass(found) and _takes_split(found) and not _needed(found)
    ]


def _needed(found: Callable[..., Any]) -> list[str]:
    parameters = list(inspect.signature(found).parameters.values())
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.name != "root" and p.kind is not p.VAR_KEYWORD
    ]


def _takes_split(found: Callable[..., Any]) -> bool:
    return bool({"train", "split"} & inspect.signature(found).parameters.keys())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
