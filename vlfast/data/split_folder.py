"""Which of your images are for training, drawn once and written down: root/split.json."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from vlfast.data.folder import class_folders, classnames_of, images_below
from vlfast.data.split_file import OWN_SPLIT
from vlfast.errors import VlfastError


def split_folder(
    root: str | Path,
    *,
    test: float = 0.2,
    val: float = 0.1,
    seed: int = 1,
    overwrite: bool = False,
) -> dict[str, int]:
    """Draw test and validation images of root/CLASS/* and write root/split.json.

    test, val: shares of each class's images, rounded; each class keeps at least one test and one
    training image. The same seed and files give the same split. Returns the images of each part.
    Raises VlfastError where a split is there already (unless ``overwrite``), and for folders that
    can't be split.
    """
    root = Path(root)
    if not 0 < test < 1 or not 0 <= val < 1 or test + val >= 1:
        raise VlfastError(
            f"split: expected shares that leave images for training, got --test {test} --val {val}"
        )
    if not root.is_dir():
        raise VlfastError(f"split: there is no folder {root}")
    file = root / OWN_SPLIT
    if file.exists() and not overwrite:
        raise VlfastError(
            f"split: {file} is there already, and runs may depend on it; --overwrite draws anew"
        )
    folders = class_folders(root)
    if {"train", "test"} <= set(folders):
        raise VlfastError(
            f"split: {root} has folders train and test, so it is split already; --data folder "
            "reads it as it is"
        )
    if not folders:
        raise VlfastError(f"split: expected one folder a class in {root}, found none")
    classnames = classnames_of(folders, root)
    generator = random.Random(seed)
    parts: dict[str, list[tuple[str, int, str]]] = {"train": [], "val": [], "test": []}
    for label, folder in enumerate(folders):
        images = images_below(root / folder, root)
        if len(images) < 2:
            raise VlfastError(
                f"split: {root / folder} has {len(images)} images, expected at least 2, one to "
                "train and one to test"
            )
        generator.shuffle(images)
        tests = min(max(1, round(test * len(images))), len(images) - 1)
        vals = min(round(val * len(images)), len(images) - tests - 1)
        drawn = {
            "test": images[:tests],
            "val": images[tests : tests + vals],
            "train": images[tests + vals :],
        }
        for part, names in drawn.items():
            parts[part] += [(name, label, classnames[label]) for name in sorted(names)]
    aside = file.with_name(f".{OWN_SPLIT}.{os.getpid()}")
    try:
        # ASCII, since a name that is not UTF-8 on the disk can be written in no other way.
        aside.write_text(json.dumps(parts, indent=0), encoding="utf-8")
        os.replace(aside, file)
    except OSError as error:
        raise VlfastError(f"split: can't write {file} ({error.strerror})") from error
    finally:
        aside.unlink(missing_ok=True)
    return {part: len(rows) for part, rows in parts.items()}
