"""The learned context of every epoch: what `vlfast interpret --over-training` reads."""

from __future__ import annotations

import torch
from torch import Tensor

from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.run_folder import RunFolder

FILE = "contexts"  # .safetensors
CLASSES_KEPT = 4  # of class-specific contexts: all of them would be gigabytes


class ContextHistory:
    """contexts.safetensors: fp32 [E + 1, n, d], or [E + 1, C, n, d] of the first classes, the
    context before training and after each of E epochs. Prompts without context vectors have none.

    A few kilobytes an epoch, written aside and renamed. epochs: finished ones, whose contexts stay.
    """

    def __init__(self, classifier: PromptedClassifier, folder: RunFolder, epochs: int) -> None:
        self._prompts = classifier.prompts
        self._names = classifier.classnames[:CLASSES_KEPT]
        self._folder = folder
        vectors = self._vectors()
        self._kept = [] if vectors is None else [vectors]
        if epochs and self._kept:
            # The epoch under way when the run was killed may be in the file already.
            self._kept = list(read_history(folder)[0][: epochs + 1])

    def append(self) -> None:
        """Write the file with the context as it is now."""
        vectors = self._vectors()
        if vectors is not None:
            self._kept.append(vectors)
            names = self._names if vectors.ndim == 3 else None
            self._folder.write_tensors(
                FILE, {"contexts": torch.stack(self._kept)}, {"classnames": names}
            )

    def _vectors(self) -> Tensor | None:
        vectors = self._prompts.context_vectors()
        if vectors is None:
            return None
        kept = vectors[:CLASSES_KEPT] if vectors.ndim == 3 else vectors
        return kept.detach().float().cpu().clone()


def read_history(folder: RunFolder) -> tuple[Tensor, list[str] | None]:
    """The contexts, and the names of their classes where each class has its own. Raises
    FileNotFoundError, or VlfastError for a damaged file."""
    tensors, about = folder.read_tensors(FILE)
    return tensors["contexts"], about["classnames"]
