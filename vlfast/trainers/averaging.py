"""PromptSRC's Gaussian averaging of what is learned over epochs (arXiv 2307.06948)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vlfast.errors import VlfastError
from vlfast.trainers.config import RecipeConfig


def epoch_weights(epochs: int, mean: float, std: float) -> Tensor:
    """fp64 [epochs]: the normal density at epochs 1 to ``epochs``, in units of its sum
    ([SRC] trainers/promptsrc.py:262-270)."""
    distance = (torch.arange(1, epochs + 1, dtype=torch.float64) - mean) / std
    return torch.softmax(-0.5 * distance.square(), dim=0)


class Averaging:
    """The weighted sum of learnable tensors over the epochs, as they end. Only what is learned is
    averaged; running statistics stay those of the last epoch.

    sums: fp32, or the parameter's dtype, by name; part of the state that resuming needs.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], epochs: int, mean: float, std: float
    ) -> None:
        self._parameters = {name: p for name, p in parameters if p.requires_grad}
        self._weights = epoch_weights(epochs, mean, std).tolist()
        self.sums = {name: torch.zeros_like(p) for name, p in self._parameters.items()}

    @classmethod
    def of_recipe(
        cls, recipe: RecipeConfig, parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> Averaging | None:
        """None where the recipe does not average."""
        if recipe.average_mean is None:
            return None
        return cls(parameters, recipe.epochs, recipe.average_mean, recipe.average_std)

    @torch.no_grad()
    def epoch_done(self, epoch: int) -> None:
        """Add the tensors as they are after ``epoch``; after the last, write the average there."""
        for name, parameter in self._parameters.items():
            self.sums[name].add_(parameter.detach(), alpha=self._weights[epoch - 1])
            if epoch == len(self._weights):
                parameter.copy_(self.sums[name])

    @torch.no_grad()
    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from the ``sums`` of an earlier part of the run."""
        for name, value in self.sums.items():
            value.copy_(sums[name])


def check_averaging(recipe: RecipeConfig) -> None:
    """Raise VlfastError unless both options are given, or none, and they make sense."""
    mean, std = recipe.average_mean, recipe.average_std
    if (mean is None) != (std is None):
        given, missing = ("average_mean", "average_std")[:: 1 if std is None else -1]
        raise VlfastError(
            f"recipe.{missing}: averaging takes both average_mean and average_std, got only {given}"
        )
    if std is not None and not (0 < std < float("inf")):
        raise VlfastError(f"recipe.average_std: expected a positive number, got {std}")
    if mean is not None and not abs(mean) < float("inf"):
        raise VlfastError(f"recipe.average_mean: expected a number, got {mean}")
