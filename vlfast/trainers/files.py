"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside ``file`` to write to; what is there at the end takes its place, on disk and in
    one step. After an error ``file`` is as it was."""
    aside = file.with_name(f".{file.name}.tmp")
    try:
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
