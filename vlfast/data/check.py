"""What is there of a dataset, what is missing or broken, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlfast.data.catalog import load_dataset
from vlfast.data.coop.layouts import IMAGENET_DOMAINS, LAYOUTS, Layout, layout_of
from vlfast.data.coop.load import find_folder, read_listed, remedy_of, where_it_is
from vlfast.data.csv_table import load_csv
from vlfast.data.dataset import Dataset, Split
from vlfast.data.dictionary import read_classnames
from vlfast.data.downloads import ARCHIVES, FETCHED
from vlfast.data.folder import FileImages, load_folder
from vlfast.data.unlabelled import load_unlabelled
from vlfast.errors import VlfastError, unknown_name

State = Literal["complete", "incomplete", "damaged", "missing"]
# Called with how many images were looked at, of how many.
OnImages = Callable[[int, int], None]

_COUNTED = {
    "classes": "classes",
    "train": "training images",
    "val": "validation images",
    "test": "test images",
    "base_test": "test images of base classes",
    "new_test": "test images of new classes",
}
_AT_ONCE = 64  # images that a process decodes before it reports
_FEW = 200  # no processes are started for fewer images


@dataclass
class Report:
    """What was found of one dataset.

    folder: where it was looked for. classes, images (by split), base_test and new_test: what is
    there. expected: what must be, by the same names; nothing of one's own data. problems: one line
    each, with the remedy. corrupt: images that can't be decoded, with the reason. decoded: how many
    were tried. few_shot: stored subsets.
    """

    name: str
    title: str
    folder: str
    state: State = "complete"
    classes: int | None = None
    images: dict[str, int] = field(default_factory=dict)
    base_test: int | None = None
    new_test: int | None = None
    expected: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    corrupt: dict[str, str] = field(default_factory=dict)
    decoded: int = 0
    few_shot: list[str] = field(default_factory=list)

    def found(self) -> dict[str, int]:
        """What is counted, by the names of ``expected``."""
        counts = {"classes": self.classes, **self.images}
        counts |= {"base_test": self.base_test, "new_test": self.new_test}
        return {name: count for name, count in counts.items() if count is not None}

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check_dataset(
    name: str,
    root: str | Path,
    *,
    classnames: str | None = None,
    decode: bool = True,
    jobs: int | None = None,
    on_images: OnImages | None = None,
) -> Report:
    """Look at a dataset below ``root``; nothing is raised for what is wrong with it.

    name: one of the papers', or "folder", "csv", "unlabelled", "torchvision/CLASS" with what
    ``load_dataset`` takes as their root and ``classnames``. decode: read every image. jobs:
    processes that do, by default one a core.
    """
    layout = layout_of(name)
    if layout is not None:
        return check_layout(layout, root, decode=decode, jobs=jobs, on_images=on_images)
    report = Report(name, name, str(root))
    try:
        dataset = _load_own(name, root, classnames)
        _count(report, dataset.num_classes, {n: s.labels for n, s in dataset.splits().items()})
        if name == "unlabelled" and classnames is None:
            report.classes = None
        if isinstance(dataset.train.source, FileImages):
            for part, split in dataset.splits().items():
                folder, names = _files_of(split)
                _look_for(report, part, folder, names)
            if decode:
                files = [_files_of(split) for split in dataset.splits().values()]
                _decode(report, files, jobs, on_images)
        elif decode:
            _load_all(report, dataset, on_images)
    except (VlfastError, OSError, ValueError, BrokenProcessPool) as error:
        report.problems.append(_line(error))
    return _judged(report)


def check_layout(
    layout: Layout,
    root: str | Path,
    *,
    decode: bool = True,
    jobs: int | None = None,
    on_images: OnImages | None = None,
) -> Report:
    """``check_dataset`` for one of the papers' datasets."""
    root = Path(root).expanduser()
    folder = root / layout.folder
    report = Report(layout.name, layout.title, str(folder), expected=_expected(layout))
    if not folder.exists():
        try:
            find_folder(layout, root)
        except VlfastError as error:
            report.problems.append(_line(error))
        report.problems.append(_how_to_get(layout, root))
        report.state = "missing"
        return report
    try:
        find_folder(layout, root)
        report.few_shot = _few_shot(folder)
        _look_for_parts(report, layout, root, folder)
        if not report.problems:
            listed, names = read_listed(layout, folder)
            _count(report, len(names), {part: images.labels for part, images in listed.items()})
            if layout.name in IMAGENET_DOMAINS:  # nobody halves their classes
                report.base_test = report.new_test = None
            _compare(report)
            for part, images in listed.items():
                where = partial(where_it_is, layout, folder)
                _look_for(report, part, folder, images.names, where)
            if decode:
                files = [(folder, images.names) for images in listed.values()]
                _decode(report, files, jobs, on_images)
    except (VlfastError, OSError, ValueError, BrokenProcessPool) as error:
        report.problems.append(_line(error))
    return _judged(report)


def names_to_check(names: Sequence[str]) -> list[str]:
    """The datasets by these names, or all of the papers'. Glyphs are drawn, so there is nothing to
    look at. Raises UnknownNameError."""
    known = [*LAYOUTS, "folder", "csv", "unlabelled"]
    chosen = []
    for name in names or LAYOUTS:
        layout = layout_of(name)
        if layout is None and name not in known and not name.startswith("torchvision/"):
            raise unknown_name("dataset", name, [*known, "torchvision/CIFAR10"])
        chosen.append(name if layout is None else layout.name)
    return list(dict.fromkeys(chosen))


def _load_own(name: str, root: str | Path, classnames: str | None) -> Dataset:
    """Without looking for the images, which are counted one by one later."""
    names = None if classnames is None else read_classnames(classnames)
    if name == "csv":
        return load_csv(root, names, look=False)
    if name == "folder":
        return load_folder(root, look=False)
    if name == "unlabelled":
        return load_unlabelled(root, names or ("unknown",), look=False)
    return load_dataset(name, str(root), names)


def _files_of(split: Split) -> tuple[Path, list[str]]:
    return split.source.root, split.image_keys()


def _expected(layout: Layout) -> dict[str, int]:
    return {name: n for name, n in asdict(layout.counts).items() if n is not None}


def _look_for_parts(report: Report, layout: Layout, root: Path, folder: Path) -> None:
    for file in filter(None, (layout.split_file, *layout.needs)):
        if not (folder / file).is_file():
            report.problems.append(f"put {file} at {folder / file}: {remedy_of(layout)}")
    for part in ("train", "val") if layout.name == "imagenet" else ("",):
        if not (folder / layout.images / part).is_dir():
            report.problems.append(
                f"there is no folder {folder / layout.images / part}: {_how_to_get(layout, root)}"
            )


def _how_to_get(layout: Layout, root: Path) -> str:
    images = root / layout.folder / layout.images
    by_hand = (
        f"unpack {ARCHIVES[layout.name]} so that {images} holds the images (CoOp's DATASETS.md "
        "says where to get them)"
    )
    if layout.name in FETCHED:
        return f"`vlfast data prepare {layout.name} --root {root}` fetches the images; or {by_hand}"
    return by_hand


def _count(report: Report, classes: int, labels: Mapping[str, np.ndarray]) -> None:
    report.classes = classes
    report.images = {part: len(found) for part, found in labels.items() if len(found)}
    if "test" in report.images:
        half = (classes + 1) // 2
        report.base_test = int((labels["test"] < half).sum())
        report.new_test = int((labels["test"] >= half).sum())


def _compare(report: Report) -> None:
    found = report.found()
    differences = [
        f"{found.get(name, 0):,} {_COUNTED[name]} instead of {expected:,}"
        for name, expected in report.expected.items()
        if found.get(name, 0) != expected
    ]
    if differences:
        report.problems.append(
            f"it is not the papers' dataset, results can't be compared: {', '.join(differences)}"
        )


def _look_for(
    report: Report,
    part: str,
    folder: Path,
    names: Sequence[str],
    where: Callable[[str], str] | None = None,
) -> None:
    """A problem where images are missing. where: the remedy for one."""
    if missing := missing_images(folder, names):
        remedy = f"; {where(missing[0])}" if where else ""
        report.problems.append(
            f"{len(missing):,} of {len(names):,} {part} images are not there, "
            f"{folder / missing[0]} for one{remedy}"
        )


def missing_images(folder: Path, names: Iterable[str]) -> list[str]:
    """Which of ``names`` are not below ``folder``. Folders are listed once each: asking for every
    file takes minutes where there are many."""
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        inner, file = os.path.split(name)
        if inner not in listed:
            try:
                listed[inner] = set(os.listdir(folder / inner))
            except OSError:
                listed[inner] = set()
        if file not in listed[inner]:
            missing.append(name)
    return missing


def fault_of(file: str | Path) -> str | None:
    """Why an image can't be decoded, or None if it can."""
    try:
        with Image.open(file) as image:
            # JPEGs are then decoded at an eighth of their size; every byte is read all the same.
            image.draft("RGB", (64, 64))
            image.load()
    except Exception as error:  # whatever a decoder stumbles over, the image is broken
        return (
            "no image"
            if isinstance(error, Image.UnidentifiedImageError)
            else str(error) or type(error).__name__
        )
    return None


def _decode(
    report: Report,
    files: Sequence[tuple[Path, Sequence[str]]],
    jobs: int | None,
    on_images: OnImages | None,
) -> None:
    """Decode every image that is there, each once."""
    there = {}
    for folder, names in files:
        missing = set(missing_images(folder, names))
        there |= {str(folder / name): name for name in names if name not in missing}
    paths = list(there)
    chunks = [paths[i : i + _AT_ONCE] for i in range(0, len(paths), _AT_ONCE)]
    jobs = min(jobs or os.cpu_count() or 1, len(chunks))
    if jobs < 2 or len(paths) < _FEW:
        _collect(report, there, zip(chunks, map(_faults, chunks), strict=True), on_images)
        return
    pool = ProcessPoolExecutor(jobs)
    try:
        found = pool.map(_faults, chunks)
        _collect(report, there, zip(chunks, found, strict=True), on_images)
    finally:
        pool.shutdown(cancel_futures=True)


def _faults(paths: Sequence[str]) -> list[tuple[str, str]]:
    return [(path, fault) for path in paths if (fault := fault_of(path)) is not None]


def _collect(
    report: Report,
    name_of: Mapping[str, str],
    found: Iterable[tuple[Sequence[str], Sequence[tuple[str, str]]]],
    on_images: OnImages | None,
) -> None:
    for chunk, faults in found:
        report.decoded += len(chunk)
        report.corrupt |= {name_of[path]: fault for path, fault in faults}
        if on_images is not None:
            on_images(report.decoded, len(name_of))


def _load_all(report: Report, dataset: Dataset, on_images: OnImages | None) -> None:
    """Images that are in no files of their own."""
    splits = dataset.splits().values()
    total = sum(len(split) for split in splits)
    for split in splits:
        for position in range(len(split)):
            try:
                split.image(position)
            except VlfastError as error:
                report.corrupt[split.source.key(int(split.indices[position]))] = _line(error)
            report.decoded += 1
            if on_images is not None and report.decoded % _AT_ONCE == 0:
                on_images(report.decoded, total)


def _few_shot(folder: Path) -> list[str]:
    found = (folder / "split_fewshot").glob("shot_*-seed_*.*")
    return sorted(file.name for file in found if file.suffix in (".pkl", ".json"))


def _judged(report: Report) -> Report:
    if report.corrupt:
        report.state = "damaged"
    elif report.problems:
        report.state = "incomplete"
    return report


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).removeprefix("data.root: ")
