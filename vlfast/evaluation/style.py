"""What all pictures share: colours, a figure, plain axes, and a file that is whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlfast.trainers.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which remain distinct to colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RIGHT, WRONG, INK, FAINT = "#009E73", "#B3261E", "#202124", "#80868B"
GAIN, LOSS = "#0072B2", "#D55E00"
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def line_style(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of line ``number``: six colours, then the same ones dashed."""
    turn = number // len(COLOURS) % len(_DASHES)
    colour = COLOURS[number % len(COLOURS)]
    return {"color": colour, "linestyle": _DASHES[turn], "marker": _MARKERS[turn]}


def new_figure(width: float, height: float) -> Figure:
    """Inches. Drawn without a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=130)


def plain_axes(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(colors=FAINT)
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="#E8EAED", linewidth=0.8)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a PNG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", facecolor="white")


def figure_text(text: str, length: int = 28) -> str:
    """A user's words in a figure: at most ``length`` characters, and no dollar sign is
    mathematics."""
    cut = text if len(text) <= length else f"{text[: length - 1].rstrip()}…"
    return cut.replace("$", r"\$")
