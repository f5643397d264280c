"""Pictures of runs: how the loss and the accuracy went, what was predicted, what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlfast.evaluation.style import (
    COLOURS,
    FAINT,
    INK,
    RIGHT,
    WRONG,
    new_figure,
    plain_axes,
    save_figure,
)


@dataclass(frozen=True)
class Guess:
    """What one method made of an image: its best class name and the probability."""

    method: str
    classname: str
    probability: float


@dataclass(frozen=True)
class Example:
    """An image, its class name, which half the class is in, and what each method made of it."""

    image: Image.Image
    classname: str
    half: str
    guesses: Sequence[Guess]


@dataclass(frozen=True)
class WordHistory:
    """The nearest word of every context vector after each epoch, 0 being before training.

    vectors: their names. words[e][v] and distances [E + 1, V]: of vector v after epoch e.
    """

    vectors: Sequence[str]
    words: Sequence[Sequence[str]]
    distances: np.ndarray


@dataclass(frozen=True)
class PromptShares:
    """How much of a class's test images each hard prompt of the pool teaches.

    shares: fp32 [C, H], the mean over a class's images of the weights that the gate gives; a row
    adds up to 1. classnames: C, those that have test images.
    """

    templates: Sequence[str]
    classnames: Sequence[str]
    shares: np.ndarray


def plot_training(metrics: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Curves over epochs, one colour a run: cross-entropy, accuracy, and perplexity where a run
    has it (as its logarithm per context vector, which is what is minimised).

    metrics: rows of metrics.jsonl by run name. Writes a PNG.
    """
    panels = [("labels", "cross-entropy, training", "nats")]
    panels.append(("val_accuracy", "accuracy, validation", "%"))
    if any("perplexity" in row for rows in metrics.values() for row in rows):
        panels.append(("perplexity", "log perplexity of the context", "nats a vector"))
    figure = new_figure(4.4 * len(panels), 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, title, unit) in zip(axes, panels, strict=True):
        for colour, (name, rows) in zip(COLOURS, metrics.items(), strict=False):
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, label=name)
        axis.set_title(title, fontsize=11, color=INK, loc="left")
        axis.set_xlabel("epoch", color=FAINT)
        axis.set_ylabel(unit, color=FAINT)
        plain_axes(axis)
    axes[0].legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_predictions(
    examples: Sequence[Example], path: str | Path, *, title: str, columns: int = 6
) -> None:
    """Images with their class names, and under each what every method guessed, right or wrong.

    Writes a PNG.
    """
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    columns = min(columns, len(examples))
    rows = -(-len(examples) // columns)
    lines = max(len(example.guesses) for example in examples)
    picture, text = 2.0, 0.21 * lines + 0.1
    figure = new_figure(2.3 * columns, (picture + text + 0.35) * rows + 0.4)
    figure.suptitle(title, fontsize=13, color=INK, x=0.01, ha="left")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[picture, text] * rows)
    for axis in axes.flatten():
        axis.axis("off")
    for number, example in enumerate(examples):
        row, column = divmod(number, columns)
        above, below = axes[2 * row, column], axes[2 * row + 1, column]
        above.imshow(example.image, interpolation="nearest")
        above.set_title(
            f"{example.classname}  ({example.half})", fontsize=10, color=INK, loc="left", pad=4
        )
        for line, guess in enumerate(example.guesses):
            right = guess.classname == example.classname
            below.text(
                0.0,
                1.0 - line / lines,
                f"{guess.method}: {guess.classname} {100 * guess.probability:.0f} %",
                transform=below.transAxes,
                fontsize=8.5,
                va="top",
                color=RIGHT if right else WRONG,
                fontweight="bold" if right else "normal",
            )
    save_figure(figure, path)


def plot_word_history(history: WordHistory, path: str | Path, *, title: str) -> None:
    """A row a context vector, over epochs: its nearest word, and as a colour how far away that is.

    A word is written where it becomes the nearest, if there is room for it. Writes a PNG.
    """
    epochs, count = history.distances.shape
    width, row = 9.5, 0.34
    figure = new_figure(width + 2.2, row * count + 1.3)
    axis = figure.subplots()
    image = axis.imshow(
        history.distances.T,
        aspect="auto",
        cmap="YlGnBu",
        interpolation="nearest",
        extent=(-0.5, epochs - 0.5, count - 0.5, -0.5),
    )
    room = width / epochs  # inches an epoch
    for vector in range(count):
        words = [of_epoch[vector] for of_epoch in history.words]
        for start, end in _runs_of(words):
            if start:
                axis.plot([start - 0.5] * 2, [vector - 0.5, vector + 0.5], color="white", lw=1.2)
            if room * (end - start) > 0.07 * len(words[start]) + 0.12:
                shade = image.norm(history.distances[start, vector])
                axis.text(
                    start - 0.5 + 0.06 / room,
                    vector,
                    words[start],
                    fontsize=8.5,
                    va="center",
                    color="white" if shade > 0.55 else INK,
                )
    axis.set_yticks(range(count), history.vectors, fontsize=9)
    axis.set_xlabel("epoch (0: before training)", color=FAINT)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(length=0, colors=INK)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_yticks([v + 0.5 for v in range(count - 1)], minor=True)
    axis.grid(axis="y", which="minor", color="white", linewidth=2)
    axis.tick_params(which="minor", length=0)
    axis.set_title(title, fontsize=11, color=INK, loc="left")
    bar = figure.colorbar(image, ax=axis, fraction=0.04, pad=0.015)
    bar.set_label("distance to the nearest word", color=FAINT, fontsize=9)
    bar.ax.tick_params(colors=FAINT, length=0)
    bar.outline.set_visible(False)
    save_figure(figure, path)


def plot_prompt_shares(
    shares: PromptShares, path: str | Path, *, title: str, classes: int = 40
) -> None:
    """Classes x hard prompts: percent of a class's images that each prompt teaches. Writes a PNG.

    classes: how many of the first are shown, below the mean over all of them.
    """
    shown = shares.shares[:classes]
    rows = [shares.shares.mean(axis=0), *shown]
    labels = ["all classes", *shares.classnames[:classes]]
    columns = len(shares.templates)
    figure = new_figure(0.5 * columns + 3.4, 0.26 * len(rows) + 2.4)
    axis = figure.subplots()
    image = axis.imshow(rows, aspect="auto", cmap="YlGnBu", vmin=0, interpolation="nearest")
    for y, row in enumerate(rows):
        for x, share in enumerate(row):
            if share >= 0.005:
                colour = "white" if image.norm(share) > 0.55 else INK
                axis.text(
                    x, y, f"{100 * share:.0f}", fontsize=7.5, ha="center", va="center", color=colour
                )
    axis.axhline(0.5, color="white", linewidth=4)
    axis.set_yticks(range(len(rows)), labels, fontsize=9)
    axis.xaxis.tick_top()
    slanted = {"rotation": 35, "ha": "left", "rotation_mode": "anchor"}
    axis.set_xticks(range(columns), shares.templates, fontsize=8.5, **slanted)
    axis.tick_params(length=0, colors=INK)
    for side in axis.spines.values():
        side.set_visible(False)
    figure.suptitle(f"{title} (%)", fontsize=11, color=INK, x=0.01, ha="left")
    save_figure(figure, path)


def _runs_of(values: Sequence[str]) -> list[tuple[int, int]]:
    """[start, end) of each stretch of equal values."""
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    return list(zip(starts, [*starts[1:], len(values)], strict=True))
