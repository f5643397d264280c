"""Tiny image files of the tests' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int = 0) -> Path:
    """36 x 40 pixels of noise, in the format that the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def cut_short(path: Path, share: float = 0.5) -> None:
    """Keep the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
