"""What a run shows while it trains: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich import progress as bars
from rich.console import Console

LINES = 10  # how many lines a run prints where there is no terminal


class Progress:
    """Loss, accuracy and time left over all epochs. ``show=False`` shows nothing."""

    def __init__(self, epochs: int, steps: int, *, start: int = 0, show: bool = True) -> None:
        self.epochs = epochs
        self.steps = steps
        self.epoch = start
        self._console = Console(stderr=True)
        self._lines = show and not self._console.is_terminal
        self._bar = None
        if show and self._console.is_terminal:
            self._bar = bars.Progress(
                bars.TextColumn("epoch {task.fields[epoch]}"),
                bars.BarColumn(),
                bars.TextColumn("{task.fields[numbers]}"),
                bars.TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(
                "train",
                total=epochs * steps,
                completed=start * steps,
                epoch=self._name(start + 1),
                numbers="",
            )

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step_done(self, number: int, means: dict[str, float]) -> None:
        if self._bar:
            known = "accuracy" in means
            accuracy = f"  accuracy {100 * means['accuracy']:.1f} %" if known else ""
            self._bar.update(
                self._task,
                completed=self.epoch * self.steps + number,
                epoch=self._name(self.epoch + 1),
                numbers=f"loss {means['loss']:.3f}{accuracy}",
            )

    def epoch_done(self, row: dict[str, Any]) -> None:
        self.epoch = row["epoch"]
        every = max(1, self.epochs // LINES)
        if self._lines and (self.epoch % every == 0 or self.epoch == self.epochs):
            parts = [f"loss {row['loss']:.3f}"]
            for part in ("train", "val"):
                if f"{part}_accuracy" in row:
                    parts.append(f"{part} {row[f'{part}_accuracy']:.1f} %")
            left = row["seconds"] / self.epoch * (self.epochs - self.epoch)
            self._console.print(
                f"epoch {self._name(self.epoch)}  {'  '.join(parts)}  {left:.0f} s left",
                highlight=False,
            )

    def _name(self, epoch: int) -> str:
        return f"{min(epoch, self.epochs)}/{self.epochs}"
