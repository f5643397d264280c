"""The metrics of a run as TensorBoard's event files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from vlfast.errors import VlfastError
from vlfast.trainers.run_folder import RunFolder


def check_tensorboard() -> None:
    """Raise VlfastError where the package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise VlfastError(
            "tensorboard: the package is missing; pip install 'vlfast[tensorboard]', or train "
            "without it (metrics.jsonl has the same numbers)"
        ) from error


class TensorBoard:
    """RUN/tensorboard: each number of metrics.jsonl by its epoch.

    The rows that metrics.jsonl holds at the beginning are written anew, so that a resumed run has
    every epoch once. ``enabled=False`` writes nothing.
    """

    def __init__(self, folder: RunFolder, *, enabled: bool) -> None:
        self._writer = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = folder.path / "tensorboard"
        shutil.rmtree(path, ignore_errors=True)
        self._writer = SummaryWriter(str(path))
        for row in folder.read_metrics():
            self.add(row)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer:
            self._writer.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.jsonl."""
        if not self._writer:
            return
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()
