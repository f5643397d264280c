"""ProGrad's update rule (arXiv 2205.14865): no step against what zero-shot CLIP knows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vlfast.errors import VlfastError
from vlfast.trainers.config import RecipeConfig
from vlfast.trainers.distributed import average


class GradientProjection:
    """Fills in gradients from two losses: that of the objectives, and that of general knowledge.

    Of each parameter, by itself: where the two gradients g and k point apart (<g, k> < 0),
    ``factor`` times the part of g along k is taken away: g - factor * <g, u> u with u = k / ||k||
    ([KgDassl] engine/trainer.py:311-349); elsewhere it is g.
    """

    def __init__(self, factor: float, parameters: Sequence[nn.Parameter]) -> None:
        self.factor = factor
        self.parameters = list(parameters)

    def backward(self, accelerator: Accelerator, loss: Tensor, general: Tensor) -> None:
        """Write each parameter's ``grad``, times the gradient scaler's factor where there is one,
        as ``accelerator.backward`` does."""
        scaler = accelerator.scaler
        losses = [loss, general] if scaler is None else [scaler.scale(x) for x in (loss, general)]
        of_loss, of_general = (
            torch.autograd.grad(x, self.parameters, retain_graph=x is losses[0], allow_unused=True)
            for x in losses
        )
        average([*of_loss, *of_general], accelerator)
        for parameter, gradient, known in zip(self.parameters, of_loss, of_general, strict=True):
            if gradient is not None and known is not None:
                gradient = project(gradient, known, self.factor)
            parameter.grad = gradient


def project(gradient: Tensor, general: Tensor, factor: float) -> Tensor:
    """The gradient without ``factor`` times what goes against ``general``, both of one shape; NaN
    where their product is not finite, so that a gradient scaler sees an overflow in either."""
    along = (gradient * general).sum()
    # Where <g, k> is negative k is not zero.
    share = factor * along.clamp_max(0) / general.square().sum().clamp_min(1e-38)
    return gradient - share * general


def check_projection(recipe: RecipeConfig) -> None:
    """Raise VlfastError for a factor that is no positive number."""
    if recipe.projection is not None and not 0 < recipe.projection < math.inf:
        raise VlfastError(
            f"recipe.projection: expected a positive number, got {recipe.projection}; without it "
            "gradients stay as they are"
        )
