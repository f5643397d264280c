"""FGVCAircraft's own text files, which say what split files say of the others."""

from __future__ import annotations

from pathlib import Path

from vlfast.data.listed import Listed
from vlfast.data.text_lines import read_lines
from vlfast.errors import VlfastError


def read_aircraft(folder: Path, images: str) -> tuple[dict[str, Listed], tuple[str, ...]]:
    """Train, val and test, and the class names, in the order of variants.txt ([CoOp]
    datasets/fgvc_aircraft.py). A line of the others is an image's number and its variant."""
    variants = tuple(line for _, line in read_lines(folder / "variants.txt"))
    label_of = {name: label for label, name in enumerate(variants)}
    if len(label_of) != len(variants):
        raise VlfastError(f"data.root: {folder / 'variants.txt'} has a class twice")
    listed = {}
    for part in ("train", "val", "test"):
        file = folder / f"images_variant_{part}.txt"
        names, labels = [], []
        for number, line in read_lines(file):
            image, _, variant = line.partition(" ")
            if variant not in label_of:
                raise VlfastError(
                    f"data.root: line {number} of {file}: expected an image's number and a class "
                    f"of variants.txt, got {line!r}"
                )
            names.append(f"{images}/{image}.jpg")
            labels.append(label_of[variant])
        listed[part] = Listed.of(names, labels)
    return listed, variants
