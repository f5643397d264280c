"""Results as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces: the first to the left, the others to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def accuracy_table(accuracy: Mapping[str, Any], best: Mapping[str, Any] | None = None) -> str:
    """A run's accuracy, one line a test set: base, new and harmonic mean, or the test accuracy.

    best: {"epoch", "accuracy"} of the epoch that the validation images chose; each set then has a
    line for it below that of the last epoch. Without test images it says so.
    """
    if not accuracy:
        return (
            "no test images; `vlfast evaluate RUN --data NAME --data.root DIR` tests it elsewhere"
        )
    sets = {"test": accuracy, **accuracy.get("domains", {})}
    if best is not None:
        chosen = best["accuracy"]
        of_best = {"test": chosen, **chosen.get("domains", {})}
        named = f"best (epoch {best['epoch']})"
        sets = {
            f"{name}, {which}": scores
            for name in sets
            for which, scores in (("last", sets[name]), (named, of_best[name]))
        }
    if "base" in accuracy:
        header = ["accuracy, %", "base", "new", "harmonic mean"]
        rows = [[name, *base_new_cells(scores)] for name, scores in sets.items()]
    else:
        header = ["accuracy, %", "top-1", "macro-F1"]
        rows = [
            [name, f"{s['test']['accuracy']:.1f}", f"{s['test']['macro_f1']:.1f}"]
            for name, s in sets.items()
            if "test" in s
        ]
    return text_table(header, rows)


def base_new_cells(scores: Mapping[str, Any]) -> list[str]:
    """Base, new and harmonic mean of one test set as text, "-" where there is none."""
    numbers = [scores[part]["accuracy"] if part in scores else None for part in ("base", "new")]
    return ["-" if n is None else f"{n:.1f}" for n in (*numbers, scores.get("harmonic_mean"))]
