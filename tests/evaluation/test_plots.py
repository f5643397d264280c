"""Pictures are written, and show what they were given."""

import pytest
from PIL import Image

from vlfast.evaluation.plots import Example, Guess, plot_predictions, plot_training

ROWS = [
    {"epoch": e, "labels": 2.0 / e, "val_accuracy": 50.0 + e, "perplexity": 10.0 - e}
    for e in range(1, 6)
]


def texts(monkeypatch):
    """Collect the text that axes are given."""
    from matplotlib.axes import Axes

    seen = []
    original = Axes.text

    def text(self, x, y, s, **options):
        seen.append((s, options.get("color")))
        return original(self, x, y, s, **options)

    monkeypatch.setattr(Axes, "text", text)
    return seen


def test_training_curves(tmp_path):
    without = [{k: v for k, v in row.items() if k != "perplexity"} for row in ROWS]
    plot_training({"CoOp": without}, tmp_path / "two.png")
    plot_training({"CoOp": without, "CoOp+PLPP": ROWS}, tmp_path / "sub" / "three.png")
    two, three = Image.open(tmp_path / "two.png"), Image.open(tmp_path / "sub" / "three.png")
    assert three.width > 1.4 * two.width
    assert len(three.convert("RGB").resize((200, 60)).getcolors(100_000)) > 20


def test_predictions_are_coloured_by_being_right(tmp_path, monkeypatch):
    seen = texts(monkeypatch)
    image = Image.new("RGB", (32, 32), "navy")
    examples = [
        Example(image, "key", "base", [Guess("zero-shot", "lock", 0.4), Guess("CoOp", "key", 0.9)]),
        Example(image, "saw", "new", [Guess("zero-shot", "saw", 0.5), Guess("CoOp", "axe", 0.6)]),
    ]
    plot_predictions(examples, tmp_path / "p.png", title="glyphs/tools")
    colours = dict(seen)
    assert colours["CoOp: key 90 %"] == colours["zero-shot: saw 50 %"]
    assert colours["zero-shot: lock 40 %"] == colours["CoOp: axe 60 %"]
    assert colours["CoOp: key 90 %"] != colours["CoOp: axe 60 %"]
    assert Image.open(tmp_path / "p.png").width > 300


def test_nothing_to_show():
    with pytest.raises(ValueError, match="examples: expected at least one"):
        plot_predictions([], "never.png", title="")
