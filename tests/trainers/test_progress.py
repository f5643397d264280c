"""What a run shows: lines, or a bar, with accuracy or without."""

import io

import pytest
from rich.console import Console

from vlfast.trainers import progress as module
from vlfast.trainers.progress import Progress


@pytest.fixture
def shown(monkeypatch):
    """What is written to a console that is a terminal, or is none."""

    def use(terminal):
        written = io.StringIO()
        monkeypatch.setattr(
            module,
            "Console",
            lambda stderr: Console(file=written, force_terminal=terminal, width=100),
        )
        return written

    return use


def run(rows, means):
    with Progress(len(rows), 2) as progress:
        for row in rows:
            for step in (1, 2):
                progress.step_done(step, means)
            progress.epoch_done(row)


ROWS = [{"epoch": e, "loss": 2.0 / e, "seconds": 3.0 * e} for e in (1, 2)]


def test_lines_without_accuracy(shown):
    written = shown(terminal=False)
    run(ROWS, {"loss": 1.5})
    assert written.getvalue().splitlines() == [
        "epoch 1/2  loss 2.000  3 s left",
        "epoch 2/2  loss 1.000  0 s left",
    ]


def test_lines_with_accuracy(shown):
    written = shown(terminal=False)
    run([{**row, "train_accuracy": 50.0, "val_accuracy": 40.0} for row in ROWS], {"loss": 1.5})
    assert written.getvalue().startswith("epoch 1/2  loss 2.000  train 50.0 %  val 40.0 %  3 s")


@pytest.mark.parametrize("accuracy", [{}, {"accuracy": 0.25}])
def test_bar(shown, accuracy):
    written = shown(terminal=True)
    run(ROWS, {"loss": 1.5, **accuracy})
    text = written.getvalue()
    assert "loss 1.500" in text and "epoch 2/2" in text
    assert ("accuracy 25.0 %" in text) == bool(accuracy)


def test_nothing_is_shown_when_not_asked(shown):
    for terminal in (True, False):
        written = shown(terminal)
        with Progress(1, 1, show=False) as progress:
            progress.step_done(1, {"loss": 1.0})
            progress.epoch_done(ROWS[0])
        assert written.getvalue() == ""
