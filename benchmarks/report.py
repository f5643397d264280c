"""The tables and the plot of what the contests found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.contest import OURS, Result

RESULTS = Path(__file__).parent / "results"


def table(results: Sequence[Result]) -> list[str]:
    """The lines of a Markdown table of one op."""
    others = other_sides(results)
    shown = [OURS, *dict.fromkeys(side for result in results for side in result.baselines)]
    unit, microseconds = unit_of(results)
    head = ["case", "mode", f"{OURS}, {unit}", *(f"{side}, x" for side in others)]
    head += [f"error of {OURS}", *(f"of {side}" for side in shown[1:])]
    head += [f"peak of {OURS}, MB", *(f"of {side}, MB" for side in shown[1:]), "rate"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in results:
        guesses = extrapolated(results, result)
        ours = times_of(result)[OURS]
        cells = [result.case, result.mode, f"{ours / microseconds:.0f}"]
        for side in others:
            guess = f"~{guesses[side].time / ours:.1f}" if side in guesses else ""
            cells.append(ratio(result, side) or guess)
        cells += [f"{result.errors[s]:.0e}" if s in result.errors else "" for s in shown]
        for side in shown:
            guess = f"~{guesses[side].peak:.0f}" if side in guesses else ""
            cells.append(f"{result.peaks[side]:.1f}" if side in result.peaks else guess)
        cells.append(rate(result))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def other_sides(results: Sequence[Result]) -> list[str]:
    sides = dict.fromkeys(side for result in results for side in times_of(result))
    return [side for side in sides if side != OURS]


def times_of(result: Result) -> dict[str, float]:
    return result.device_times or result.times


def unit_of(results: Sequence[Result]) -> tuple[str, float]:
    """A unit for our times, and how many microseconds it has."""
    slow = all(times_of(result)[OURS] > 1e4 for result in results)
    return ("ms", 1e3) if slow else ("us", 1.0)


def ratio(result: Result, side: str) -> str:
    """The median over the rounds; that of the best calls, or of the device times, behind it."""
    if side not in result.ratios:
        return ""
    if side in result.alone:
        return f"{result.ratios[side]:.2f} (one call)"
    times = times_of(result)
    return f"{result.ratios[side]:.2f} ({times[side] / times[OURS]:.2f})"


class Guess(NamedTuple):
    time: float
    peak: float


def extrapolated(results: Sequence[Result], result: Result) -> dict[str, Guess]:
    """Of the sides not measured at this size: the largest that was, in proportion."""
    if result.over is None:
        return {}
    guesses = {}
    for side in other_sides(results):
        measured = [
            other
            for other in over_sizes(results)
            if other.mode == result.mode and side in times_of(other)
        ]
        if measured and side not in times_of(result) and result.over[1] > measured[-1].over[1]:
            largest = measured[-1]
            by = result.over[1] / largest.over[1]
            guesses[side] = Guess(by * times_of(largest)[side], by * largest.peaks[side])
    return guesses


def over_sizes(results: Sequence[Result]) -> list[Result]:
    """Those of a sweep, with their memory, by size."""
    return sorted((r for r in results if r.over and r.peaks), key=lambda result: result.over[1])


def rate(result: Result) -> str:
    if result.gbytes_per_s:
        return f"{result.gbytes_per_s:.0f} GB/s"
    return f"{result.gflops:.0f} GFLOP/s" if (result.gflops or 0) >= 1 else ""


def explanation(machine: Mapping[str, Any], yardstick: str) -> list[str]:
    return [
        f"{OURS}: the time of the best call. The others: how many times that they take, as the "
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


def notes(results: Sequence[Result]) -> list[str]:
    """What the table of one op needs to be read, beside the explanation of all."""
    lines = []
    for result in results:
        for side in result.alone:
            lines.append(f"{side} at {result.case}: one call, in a process of its own.")
        for side in extrapolated(results, result):
            lines.append(
                f"{side} at {result.case} (~): not measured but extrapolated, in "
                "proportion to the size, from the largest one measured."
            )
    return lines


def write(op: str, results: Sequence[Result], slug: str, machine: dict, yardstick: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{slug}-{op}"
    record = {"machine": machine, "yardstick": yardstick, "results": [asdict(r) for r in results]}
    path.with_suffix(".json").write_text(json.dumps(rounded(record), indent=1) + "\n")
    lines = [f"# {op}", "", *table(results), ""]
    for note in notes(results):
        lines += [note, ""]
    lines += explanation(machine, yardstick)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(op, results, path.with_suffix(".png"))
    sweep = over_sizes(results)
    if len(sweep) > 1:
        what, _ = sweep[0].over
        plot_over_sizes(op, sweep, path.with_name(f"{path.name}-over-{what}.png"))


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

    others = other_sides(results)
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


def plot_over_sizes(op: str, sweep: Sequence[Result], path: Path) -> None:
    """Time and memory of each side; what was extrapolated is hollow."""
    from matplotlib.figure import Figure

    what, _ = sweep[0].over
    sides = [OURS, *other_sides(sweep)]
    figure = Figure(figsize=(9, 4))
    seconds, megabytes = figure.subplots(1, 2)
    for number, side in enumerate(sides):
        points = []
        for result in sweep:
            guess = extrapolated(sweep, result).get(side)
            if side in result.peaks:
                times = times_of(result)
                points.append((result.over[1], times[side] / 1e6, result.peaks[side], True))
            elif guess:
                points.append((result.over[1], guess.time / 1e6, guess.peak, False))
        sizes, times, peaks, measured = zip(*points, strict=True)
        for axes, values in ((seconds, times), (megabytes, peaks)):
            axes.plot(sizes, values, color=f"C{number}", linewidth=1, label=side)
            for size, value, solid in zip(sizes, values, measured, strict=True):
                filling = f"C{number}" if solid else "white"
                axes.plot(size, value, "o", color=f"C{number}", markerfacecolor=filling)
                if not solid:
                    axes.annotate(
                        "extrapolated",
                        (size, value),
                        (-8, 3),
                        textcoords="offset points",
                        ha="right",
                        fontsize=7,
                    )
    for axes, label in ((seconds, "seconds"), (megabytes, "rise of peak memory, MB")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([r.over[1] for r in sweep], [str(r.over[1]) for r in sweep], minor=False)
        axes.minorticks_off()
        axes.set_xlabel(what)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    seconds.legend(fontsize=8)
    figure.suptitle(f"{op}, {sweep[0].mode}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
