"""What can be known to go wrong before the first run begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vlfast.errors import UnknownNameError, VlfastError
from vlfast.parts import check_config
from vlfast.prompts import KINDS
from vlfast.protocols.cells import Cell, Target


@dataclass(frozen=True)
class Found:
    """A dataset that can be read. images: of training, in all and of the largest class."""

    images: int
    largest_class: int
    domains: bool
    classnames: tuple[str, ...]


def check_cells(cells: Sequence[Cell], *, skip_missing: bool) -> tuple[list[Cell], list[str]]:
    """The cells that can run, without the targets that can't be read, and what is missing, a line
    each; nothing is missing unless ``skip_missing``. Finished cells need nothing.

    Raises VlfastError, or one of its kind: for options that contradict each other or a run that was
    begun, for teachers and files that are not there, and for datasets that can't be read, with all
    of their names.
    """
    for cell in cells:
        cell.check()
    waiting = [cell for cell in cells if cell.state() != "done"]
    for cell in waiting:
        check_config(cell.config)
        _check_files(cell)
    found, missing = _read_all(target for c in waiting for target in (c.data, *c.targets))
    if missing and not skip_missing:
        named = "; ".join(f"{target.name} ({reason})" for target, reason in missing.items())
        raise VlfastError(
            f"--datasets: {len(missing)} of {len(missing) + len(found)} can't be read: {named}; "
            "put them there, or go on without them (--skip-missing)"
        )
    kept = []
    for cell in cells:
        if cell in waiting:
            if cell.data in missing:
                continue
            cell = replace(cell, targets=tuple(t for t in cell.targets if t in found))
            _check_images(cell, found[cell.data])
            _check_prompts(cell, found)
        kept.append(cell)
    if not kept:
        raise VlfastError("--datasets: none of them can be read: " + "; ".join(missing.values()))
    return kept, [f"{target.name}: {reason}" for target, reason in missing.items()]


def _check_files(cell: Cell) -> None:
    """Those that options name, which differ by cell where "{dataset}" and so on are filled in."""
    config = cell.config
    for option, path, file in (
        ("teacher.run", config.teacher.run, "config.yaml"),
        ("teacher.features", config.teacher.features, "manifest.json"),
        ("data.features", config.data.features, "manifest.json"),
        ("data.dictionary", config.data.dictionary, ""),
    ):
        if path is not None and not Path(path, file).exists():
            wanted = f"there is no {Path(path, file)}"
            raise VlfastError(f"--{option}: {wanted}, which {cell} needs")


def _check_images(cell: Cell, found: Found) -> None:
    if cell.trains and not (found.images or cell.config.data.unlabelled):
        raise VlfastError(f"--datasets: {cell.dataset} has no training images for {cell}")
    if cell.trains and cell.shots > found.largest_class:
        raise VlfastError(
            f"--shots: {cell.shots} images a class asked for, but {cell.dataset} has at most "
            f"{found.largest_class} training images in a class"
        )
    untested = cell.dataset == cell.source and not (cell.targets or found.domains)
    if cell.protocol == "domain-generalization" and untested:
        raise VlfastError(
            f"--datasets: {cell.source} has no domains of its own, so name those to test on"
        )


def _check_prompts(cell: Cell, found: Mapping[Target, Found]) -> None:
    kind = cell.config.prompts.kind
    own = found[cell.data].classnames
    others = [t.name for t in cell.targets if found[t].classnames != own]
    if others and KINDS[kind].class_bound:
        raise VlfastError(
            f"--prompts: {kind} prompts know only the classes that they learned, so {cell} can't "
            f"be tested on {', '.join(others)}; learn prompts that all classes share, or leave "
            "these out of --datasets"
        )


def _read_all(targets: Iterable[Target]) -> tuple[dict[Target, Found], dict[Target, str]]:
    found: dict[Target, Found] = {}
    missing: dict[Target, str] = {}
    for target in dict.fromkeys(targets):
        try:
            dataset = target.load()
        except UnknownNameError:
            raise
        except (VlfastError, OSError, ValueError) as error:
            missing[target] = " ".join(str(error).split())
            continue
        labels = dataset.train.labels
        counts = np.bincount(labels[labels >= 0], minlength=1)
        found[target] = Found(
            images=len(dataset.train),
            largest_class=int(counts.max()),
            domains=bool(dataset.domains),
            classnames=tuple(dataset.classnames),
        )
    return found, missing
