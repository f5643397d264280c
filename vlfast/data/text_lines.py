"""Text files with an entry a line."""

from __future__ import annotations

from pathlib import Path

from vlfast.errors import VlfastError


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank, without the blanks around it.

    Raises VlfastError for a file that is empty or not UTF-8, OSError for one that can't be read.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise VlfastError(f"data.root: {file} is not UTF-8 ({error})") from error
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise VlfastError(f"data.root: {file} is empty")
    return lines
