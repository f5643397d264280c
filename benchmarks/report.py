"""The tables and the plot of what the contests found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.contest import EAGER, OURS, Result

RESULTS = Path(__file__).parent / "results"


def table(results: Sequence[Result]) -> list[str]:
    """The lines of a Markdown table of one op."""
    others = [side for side in results[0].times if side != OURS]
    head = ["case", "mode", f"{OURS}, us", *(f"{side}, x" for side in others)]
    head += [f"error of {OURS}", f"of {EAGER}", f"peak of {OURS}, MB", f"of {EAGER}, MB", "rate"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in results:
        cells = [result.case, result.mode, f"{(result.device_times or result.times)[OURS]:.0f}"]
        cells += [ratio(result, side) for side in others]
        cells += [f"{result.errors[side]:.0e}" for side in (OURS, EAGER)]
        cells += [f"{result.peaks[s]:.1f}" if s in result.peaks else "" for s in (OURS, EAGER)]
        cells.append(rate(result))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def ratio(result: Result, side: str) -> str:
    """The median over the rounds; that of the best calls, or of the device times, behind it."""
    if side not in result.ratios:
        return ""
    times = result.device_times or result.times
    return f"{result.ratios[side]:.2f} ({times[side] / times[OURS]:.2f})"


def rate(result: Result) -> str:
    if result.gbytes_per_s:
        return f"{result.gbytes_per_s:.0f} GB/s"
    return f"{result.gflops:.0f} GFLOP/s" if (result.gflops or 0) >= 1 else ""


def explanation(machine: Mapping[str, Any], yardstick: str) -> list[str]:
    return [
        f"{OURS}: microseconds of the best call. The others: how many times that they take, as the "
        "median over rounds in which the sides take turns, and, in brackets, best call against "
        "best call (on a GPU: time of the kernels, the L2 cache cold). Above 1, vlfast is faster.",
        "",
        "Errors are the largest over the loss and its gradients, against fp64, relative to the "
        "largest number. Peak: by how much one more forward and backward raises that of memory; "
        "the C++ kernels keep up to some 16 MB of scratch between calls, which is not counted.",
        "",
        f"- {yardstick}",
        *(f"- {name}: {value}" for name, value in machine.items()),
    ]


def write(op: str, results: Sequence[Result], slug: str, machine: dict, yardstick: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{slug}-{op}"
    record = {"machine": machine, "yardstick": yardstick, "results": [asdict(r) for r in results]}
    path.with_suffix(".json").write_text(json.dumps(rounded(record), indent=1) + "\n")
    lines = [f"# {op}", "", *table(results), "", *explanation(machine, yardstick)]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(op, results, path.with_suffix(".png"))


def rounded(value: Any) -> Any:
    """Floats to four digits, which is more than a timing holds."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def plot(op: str, results: Sequence[Result], path: Path) -> None:
    """How many times our time each side takes; left of the line, we lose."""
    from matplotlib.figure import Figure

    others = [side for side in results[0].times if side != OURS]
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(results) * (len(others) + 1)))
    axes = figure.add_subplot()
    height = 0.8 / len(others)
    for number, side in enumerate(others):
        places = [row + height * number for row in range(len(results))]
        axes.barh(places, [r.ratios.get(side, 0) for r in results], height, label=side)
    axes.axvline(1, color="black", linewidth=1)
    middle = height * (len(others) - 1) / 2
    axes.set_yticks(
        [row + middle for row in range(len(results))],
        [f"{r.case}\n{r.mode}" for r in results],
        fontsize=7,
    )
    axes.invert_yaxis()
    axes.set_xlabel(f"times as long as {OURS} (median over rounds)")
    axes.set_title(op)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
