"""Pictures of a sweep. Each function writes a PNG, or nothing and returns False where the sweep has
not got what it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlfast.evaluation.calibration import Calibration, calibration
from vlfast.evaluation.confusion import Confusion
from vlfast.evaluation.predictions import Predictions
from vlfast.evaluation.style import (
    COLOURS,
    FAINT,
    GAIN,
    INK,
    LOSS,
    figure_text,
    line_style,
    new_figure,
    plain_axes,
    save_figure,
)
from vlfast.report.sweeps import Method, Sweep, title_of
from vlfast.report.table import Cell
from vlfast.report.tables import HARMONIC, average_cell, sweep_tests, test_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AVERAGE = "average"


def plot_few_shot_curves(sweep: Sweep, path: Path) -> bool:
    """Accuracy over shots: a panel for the average and one a dataset, a line a method, its band the
    standard deviation over seeds; zero-shot as a dashed line from a star at 0 shots. A hollow point
    is over fewer seeds or datasets than the others."""
    shots = sorted({m.shots for m in sweep.methods() if m.shots})
    if sweep.protocol != "few-shot" or not shots:
        return False
    names = list(dict.fromkeys(m.name for m in sweep.methods()))
    places = _places(sweep)
    figure, axes = _panels(len(places), 3.1, 2.5)
    zero = math.log2(shots[0]) - 1
    for axis, place in zip(axes, places, strict=True):
        for number, name in enumerate(names):
            _few_shot_line(axis, sweep, name, place, number, zero, math.log2(shots[-1]))
        axis.set_title(_place_title(sweep, place), fontsize=11, color=INK, loc="left")
        axis.set_xticks([zero, *map(math.log2, shots)], ["0", *map(str, shots)])
        axis.set_xlim(zero - 0.25, math.log2(shots[-1]) + 0.25)
        plain_axes(axis)
    _label_outer(figure, "images a class", "accuracy, %")
    _shared_legend(figure, axes)
    save_figure(figure, path)
    return True


def _few_shot_line(
    axis: Axes, sweep: Sweep, name: str, place: str, number: int, zero: float, last: float
) -> None:
    style, label = line_style(number), figure_text(name)
    points: list[tuple[float, Cell]] = []
    for method in (m for m in sweep.methods() if m.name == name):
        cell = _score(sweep, method, place)
        if cell.mean is None:
            continue
        if method.shots:
            points.append((math.log2(method.shots), cell))
        elif method.shots is None:
            axis.plot([zero, last], [cell.mean] * 2, color=INK, linewidth=1, linestyle="--")
            star = {"marker": "*", "markersize": 11, "linestyle": "--", "label": label}
            axis.plot([zero], [cell.mean], color=style["color"] if number else INK, **star)
        else:
            of_all = {"linestyle": ":", "linewidth": 1.4, "label": f"{label} (all images)"}
            axis.axhline(cell.mean, color=style["color"], **of_all)
    if not points:
        return
    x = [at for at, _ in points]
    mean = np.array([cell.mean for _, cell in points])
    std = np.array([cell.std or 0.0 for _, cell in points])
    axis.plot(x, mean, linewidth=1.7, markersize=4.5, label=label, **style)
    axis.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
    hollow = [(at, cell.mean) for at, cell in points if cell.mark]
    if hollow:
        face = {"markerfacecolor": "white", "markersize": 4.5, "linestyle": "none", "zorder": 3}
        axis.plot(*zip(*hollow, strict=True), **{**style, **face})


def plot_base_to_new(sweep: Sweep, path: Path) -> bool:
    """Bars of base, new and their harmonic mean, a colour a method: the average with its numbers
    above, a panel a dataset below. Hatched bars are over fewer seeds or datasets than the
    others."""
    if sweep.protocol != "base-to-new":
        return False
    methods = sweep.methods()
    places = _places(sweep)
    columns = _columns(len(places) - 1, 4)
    rows = -(-(len(places) - 1) // columns)
    figure = new_figure(max(7.5, 3.3 * columns), 3.4 + 2.2 * rows)
    if rows:
        top, below = figure.subfigures(2, 1, height_ratios=[3.0, 2.2 * rows])
        small = below.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    else:
        top, small = figure.subfigures(1, 1), np.array([])
    axes = [top.subplots(), *small]
    for axis in axes[len(places) :]:
        axis.axis("off")
    for axis, place in zip(axes, places, strict=False):
        _base_to_new_bars(axis, sweep, methods, place, numbers=axis is axes[0])
        axis.set_title(_place_title(sweep, place), fontsize=11, color=INK, loc="left")
        axis.set_ylim(0, 108 if axis is axes[0] else 100)
        plain_axes(axis)
    axes[0].set_ylabel("accuracy, %", color=FAINT)
    _shared_legend(figure, axes[:1])
    save_figure(figure, path)
    return True


def _base_to_new_bars(
    axis: Axes, sweep: Sweep, methods: Sequence[Method], place: str, numbers: bool
) -> None:
    width = 0.84 / len(methods)
    for number, method in enumerate(methods):
        cells = [_score(sweep, method, place, part) for part in ("base", "new", HARMONIC)]
        turn = number // len(COLOURS)
        for group, cell in enumerate(cells):
            if cell.mean is None:
                continue
            x = group + (number - (len(methods) - 1) / 2) * width
            hatch = "////" if cell.mark else ("", "...", "xx")[turn % 3]
            axis.bar(
                x,
                cell.mean,
                0.92 * width,
                yerr=cell.std,
                color=COLOURS[number % len(COLOURS)],
                edgecolor="white",
                linewidth=0.5,
                hatch=hatch,
                error_kw={"ecolor": INK, "elinewidth": 0.8},
            )
            if numbers:
                tall = cell.mean + (cell.std or 0) + 1.2
                size = 8.5 if len(methods) <= 8 else 6
                turned = 90 if len(methods) > 10 else 0
                mark = f"{cell.mean:.1f}{cell.mark}"
                axis.text(x, tall, mark, ha="center", fontsize=size, color=INK, rotation=turned)
        style = {"color": COLOURS[number % len(COLOURS)], "edgecolor": "white"}
        hatch = ("", "...", "xx")[turn % 3]
        axis.bar(0, 0, 0, label=figure_text(sweep.label(method), 34), hatch=hatch, **style)
    axis.set_xticks(range(3), ["base", "new", "harmonic mean"])
    axis.set_xlim(-0.55, 2.55)


def plot_gains(sweep: Sweep, path: Path) -> bool:
    """What each method gains over zero-shot CLIP on each dataset, in points of accuracy (of the
    harmonic mean, base-to-new), at the most shots: a panel a method, sorted."""
    from matplotlib.ticker import MaxNLocator

    untrained = [m for m in sweep.methods() if m.name == "zeroshot"]
    trained = sweep.strongest()
    tests = [t for t in sweep_tests(sweep)]
    part = HARMONIC if sweep.protocol == "base-to-new" else "test"
    panels = []
    for method in trained if untrained else ():
        gains = []
        for test in tests:
            ours = test_cell(sweep, method, test, part).mean
            theirs = test_cell(sweep, untrained[0], test, part).mean
            if ours is not None and theirs is not None:
                gains.append((ours - theirs, figure_text(title_of(test, sweep.source), 22)))
        if gains:
            panels.append((method, sorted(gains)))
    if not panels:
        return False
    bars = max(len(gains) for _, gains in panels)
    figure, axes = _panels(len(panels), 4.3, 1.0 + 0.25 * bars, columns=3)
    reach = max(abs(gain) for _, gains in panels for gain, _ in gains) or 1.0
    for axis, (method, gains) in zip(axes, panels, strict=True):
        for y, (gain, _) in enumerate(gains):
            axis.barh(y, gain, 0.72, color=GAIN if gain >= 0 else LOSS)
            side = "left" if gain >= 0 else "right"
            offset = 0.03 * reach if gain >= 0 else -0.03 * reach
            axis.text(gain + offset, y, f"{gain:+.1f}", va="center", ha=side, fontsize=8, color=INK)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_yticks(range(len(gains)), [name for _, name in gains], fontsize=9)
        axis.set_ylim(-0.6, bars - 0.4)
        lowest = min(0.0, min(gain for _, gains in panels for gain, _ in gains))
        axis.set_xlim(lowest - 0.3 * reach if lowest < 0 else -0.05 * reach, 1.22 * reach)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_title(figure_text(sweep.label(method), 34), fontsize=11, color=INK, loc="left")
        plain_axes(axis)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0, colors=INK)
    of = " of the harmonic mean" if part == HARMONIC else ""
    _label_outer(figure, f"points{of} over zero-shot", "")
    save_figure(figure, path)
    return True


def plot_losses(sweep: Sweep, path: Path) -> bool:
    """The training loss over epochs at the most shots: a panel a method, a line a dataset: the mean
    over seeds, its band from the lowest to the highest. What each panel's loss is depends on the
    method."""
    panels = []
    for method in sweep.strongest():
        by_dataset: dict[str, list[list[float]]] = {}
        for run in sweep.runs_of(method):
            losses = [row["loss"] for row in run.result.metrics() if "loss" in row]
            if losses:
                by_dataset.setdefault(run.result.dataset, []).append(losses)
        if by_dataset:
            panels.append((method, by_dataset))
    if not panels:
        return False
    datasets = list(dict.fromkeys(name for _, by_dataset in panels for name in by_dataset))
    order = [t for t in [sweep.source, *sweep.targets()] if t in datasets]
    order += [name for name in datasets if name not in order]
    figure, axes = _panels(len(panels), 3.9, 2.8, columns=3)
    for axis, (method, by_dataset) in zip(axes, panels, strict=True):
        for name in sorted(by_dataset, key=order.index):
            curves = by_dataset[name]
            length = min(map(len, curves))
            values = np.array([curve[:length] for curve in curves])
            epochs = np.arange(1, length + 1)
            style = {**line_style(order.index(name)), "marker": "o" if length == 1 else None}
            label = figure_text(title_of(name))
            axis.plot(epochs, values.mean(axis=0), linewidth=1.5, label=label, **style)
            band = {"color": style["color"], "alpha": 0.12, "linewidth": 0}
            axis.fill_between(epochs, values.min(axis=0), values.max(axis=0), **band)
        axis.set_title(figure_text(sweep.label(method), 34), fontsize=11, color=INK, loc="left")
        axis.xaxis.get_major_locator().set_params(integer=True)
        plain_axes(axis)
    _label_outer(figure, "epoch", "training loss")
    _shared_legend(figure, axes)
    save_figure(figure, path)
    return True


def plot_calibration(sweep: Sweep, path: Path) -> bool:
    """Reliability diagrams at the most shots: accuracy over confidence in 15 bins, over the test
    images of all datasets and seeds together, a row a method; base and new apart. Bars below show
    how many images are in a bin."""
    parts = ("base", "new") if sweep.protocol == "base-to-new" else ("test",)
    rows = []
    for method in sweep.strongest(untrained=True):
        found = [calibrations(sweep, method, part) for part in parts]
        if any(found):
            rows.append((method, found))
    if not rows:
        return False
    panels = [
        (method, part, one)
        for method, found in rows
        for part, one in zip(parts, found, strict=True)
    ]
    figure, axes = _panels(len(panels), 3.1, 3.0)
    for axis, (method, part, one) in zip(axes, panels, strict=True):
        title = figure_text(sweep.label(method), 24)
        if len(parts) > 1:
            title += f", {part}"
        axis.set_title(title, fontsize=10.5, color=INK, loc="left")
        if one is None:
            axis.text(0.5, 0.5, "no predictions", ha="center", color=FAINT)
            axis.axis("off")
            continue
        _reliability(axis, one)
    _label_outer(figure, "confidence", "accuracy")
    save_figure(figure, path)
    return True


def calibrations(sweep: Sweep, method: Method, part: str) -> Calibration | None:
    """The calibration over all kept predictions of a method; None if there are none."""
    import torch

    several = [
        by_part[part]
        for run in sweep.runs_of(method)
        for test, by_part in run.result.predictions().items()
        if part in by_part and (method, test, part) in sweep.scores
    ]
    if not any(len(one.labels) for one in several):
        return None
    fields = ("labels", "predicted", "confidence")
    joined = (torch.cat([getattr(one, name) for one in several]) for name in fields)
    return calibration(Predictions(*joined, ()))


def _reliability(axis: Axes, found: Calibration) -> None:
    counts = found.counts.numpy()
    bins = len(counts)
    width = 1 / bins
    left = np.arange(bins) * width
    some = counts > 0
    accuracy, confidence = found.accuracy.numpy(), found.confidence.numpy()
    options = {"width": 0.92 * width, "align": "edge"}
    axis.bar(left[some], accuracy[some], color=COLOURS[0], **options)
    low, high = np.minimum(accuracy, confidence), np.maximum(accuracy, confidence)
    gap = {"facecolor": "none", "edgecolor": LOSS, "hatch": "////", "linewidth": 0}
    axis.bar(left[some], (high - low)[some], bottom=low[some], **gap, **options)
    axis.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
    share = counts / counts.sum()
    axis.bar(left, -0.18 * share / share.max(), color=FAINT, **options)
    axis.axhline(0, color=FAINT, linewidth=0.8)
    axis.text(
        0.04,
        0.95,
        f"ECE {found.ece:.1f} %\n{counts.sum():,} images",
        transform=axis.transAxes,
        va="top",
        fontsize=9,
        color=INK,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
    )
    axis.set_xlim(0, 1)
    axis.set_ylim(-0.2, 1)
    axis.set_xticks([0, 0.5, 1])
    axis.set_yticks([0, 0.5, 1])
    plain_axes(axis)


def plot_confusion(confusion: Confusion, title: str, path: Path) -> None:
    """The worst classes and what they are taken for, in percent of a row's images; right answers
    are framed, and right of the line are classes that are none of the worst."""
    from matplotlib.patches import Rectangle

    rows, columns = confusion.shares.shape
    figure = new_figure(0.52 * columns + 3.2, 0.34 * rows + 2.6)
    axis = figure.subplots()
    image = axis.imshow(confusion.shares.numpy(), cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(confusion.shares.tolist()):
        for x, share in enumerate(row):
            if share >= 0.5:
                colour = "white" if image.norm(share) > 0.55 else INK
                centred = {"ha": "center", "va": "center"}
                axis.text(x, y, f"{share:.0f}", fontsize=8.5, color=colour, **centred)
        own = {"fill": False, "edgecolor": INK, "linewidth": 1.2}
        axis.add_patch(Rectangle((y - 0.5, y - 0.5), 1, 1, **own))
    if columns > rows:
        axis.axvline(rows - 0.5, color=FAINT, linewidth=1.5)
    axis.set_yticks(range(rows), [figure_text(name) for name in confusion.rows], fontsize=9)
    axis.xaxis.tick_top()
    slanted = {"rotation": 40, "ha": "left", "rotation_mode": "anchor", "fontsize": 9}
    axis.set_xticks(range(columns), [figure_text(n, 22) for n in confusion.columns], **slanted)
    axis.tick_params(length=0, colors=INK)
    for side in axis.spines.values():
        side.set_visible(False)
    figure.suptitle(figure_text(title, 90), fontsize=11, color=INK, x=0.01, ha="left")
    save_figure(figure, path)


def _places(sweep: Sweep) -> list[str]:
    tests = sweep_tests(sweep)
    return [AVERAGE, *tests] if len(tests) > 1 else tests


def _place_title(sweep: Sweep, place: str) -> str:
    if place == AVERAGE:
        return f"average of {len(sweep.targets())}"
    return figure_text(title_of(place, sweep.source))


def _score(sweep: Sweep, method: Method, place: str, part: str = "test") -> Cell:
    if place == AVERAGE:
        return average_cell(sweep, method, part)
    return test_cell(sweep, method, place, part)


def _panels(count: int, width: float, height: float, columns: int = 4) -> tuple[Figure, list[Axes]]:
    columns = _columns(count, columns)
    rows = -(-count // columns)
    figure = new_figure(max(width * columns, 4.6), height * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[count:]:
        axis.axis("off")
    return figure, list(axes[:count])


def _columns(count: int, most: int) -> int:
    """At most ``most``, or one fewer where that leaves fewer gaps."""
    if count <= most:
        return max(count, 1)
    return min((most, most - 1), key=lambda columns: -count % columns)


def _label_outer(figure: Figure, below: str, left: str) -> None:
    figure.supxlabel(below, fontsize=10, color=FAINT)
    if left:
        figure.supylabel(left, fontsize=10, color=FAINT)


def _shared_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend above all panels, of what any of them shows."""
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return
    columns = max(1, min(len(found), int(figure.get_figwidth() // 2)))
    options = {"frameon": False, "fontsize": 9.5, "loc": "outside upper left"}
    figure.legend(found.values(), found.keys(), ncols=columns, **options)
