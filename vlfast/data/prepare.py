"""Download what torchvision can fetch, and lay it out as CoOp has it."""

from __future__ import annotations

import inspect
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlfast.data.coop.layouts import Layout, layout_of
from vlfast.data.downloads import ARCHIVES, FETCHED, Fetch
from vlfast.errors import VlfastError, unknown_name

TORCHVISION = "torchvision/"
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".mat")
_CUT_SHORT = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError)


def prepare(name: str, root: str | Path) -> Path:
    """Fetch a dataset to ``root`` and return its folder; what is there already is left as it is.

    name: one of the papers' datasets, which gets CoOp's folder, or "torchvision/CLASS", which lies
    in ``root`` as torchvision has it. A download that was stopped goes on with its next call.
    Files that are not torchvision's (CoOp's split files) remain to be fetched by hand; ``vlfast
    data check`` names them. Raises VlfastError for what torchvision can't fetch, saying what to do
    instead, and for a download that fails.
    """
    root = Path(root).expanduser()
    if name.startswith(TORCHVISION):
        _download(name.removeprefix(TORCHVISION), root)
        return root
    layout = layout_of(name)
    if layout is None:
        raise unknown_name("dataset", name, [*FETCHED, f"{TORCHVISION}CIFAR10"])
    folder = root / layout.folder
    if layout.name not in FETCHED:
        raise VlfastError(
            f"data prepare: torchvision can't fetch {layout.title}; put {ARCHIVES[layout.name]} "
            f"unpacked at {folder / layout.images} (CoOp's DATASETS.md, section {layout.title}, "
            "says where to get it)"
        )
    if not (folder / layout.images).is_dir():
        _fetch(layout, FETCHED[layout.name], root)
    return folder


def _fetch(layout: Layout, fetch: Fetch, root: Path) -> None:
    """Into a folder aside, from which what is wanted is moved, the images last: their folder says
    that the dataset is whole."""
    aside = root / f".{layout.folder}.download"
    if aside.is_dir():
        _keep_archives(aside)
    try:
        _download(fetch.cls, aside)
    except VlfastError as error:
        if isinstance(error.__cause__, _CUT_SHORT):
            shutil.rmtree(aside)
            raise VlfastError(
                f"data prepare: the archive of {fetch.cls} was cut short and is removed "
                f"({error.__cause__}); the same command fetches it again"
            ) from error
        raise
    source, target = aside / fetch.inside, root / layout.folder
    found = fetch.keep or tuple(sorted(os.listdir(source)))
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(found, key=lambda entry: entry == layout.images):
        if not (target / entry).exists():
            os.rename(source / entry, target / entry)
    shutil.rmtree(aside)


def _keep_archives(aside: Path) -> None:
    """Remove what was unpacked before a stop: torchvision takes a folder that is there for whole.
    Archives stay, their checksums tell whether they are."""
    for folder, _, files in os.walk(aside, topdown=False):
        for file in files:
            if not file.endswith(_ARCHIVE_SUFFIXES):
                Path(folder, file).unlink()
        if not any(os.scandir(folder)):
            os.rmdir(folder)


def _download(cls: str, root: Path) -> None:
    """All splits of a class of torchvision, into ``root``."""
    from vlfast.data.torchvision_data import split_arguments, torchvision_class

    if cls in {fetch.cls for fetch in FETCHED.values()}:
        splits = {"train": [{}]}  # any of their splits brings all of it along
    else:
        splits = split_arguments(cls)
    make = torchvision_class(cls, split=cls not in ("Caltech101", "EuroSAT", "SUN397"))
    if "download" not in inspect.signature(make).parameters:
        raise VlfastError(
            f"data prepare: torchvision does not fetch {cls}; unpack it at {root} as the class "
            "expects it"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        for part, arguments in splits.items():
            refused = [_try(make, root, given) for given in arguments]
            if part == "train" and None not in refused:
                raise VlfastError(f"data prepare: torchvision can't fetch {cls} ({refused[0]})")
    except (RuntimeError, OSError, *_CUT_SHORT) as error:
        raise VlfastError(
            f"data prepare: {cls} could not be fetched ({error}); what has come is kept in {root}, "
            "and the same command goes on"
        ) from error


def _try(make: Callable[..., Any], root: Path, given: dict[str, Any]) -> ValueError | None:
    """Download a split; the error where the class has none of that name."""
    try:
        make(str(root), **given, download=True)
    except ValueError as error:
        return error
    except ImportError:
        pass  # by now it is there, and only reading it needs another package
    return None
