"""CoOp's text tower, ViT-B/32's: class features and the gradient to the context vectors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import MODES, Case, Problem
from benchmarks.padded import (
    CUT,
    MOST_ON_A_CPU,
    PADDED,
    Loss,
    PaddedTower,
    build_clip,
    class_names,
    three_sides,
)
from vlfast.clip.text_tower import TextTower

# The image tower is of no interest here.
SMALL_VISION = {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1}


def make(
    classes: int,
    device: str,
    *,
    per: str = "all",
    position: str = "end",
    n_ctx: int = 16,
    images: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Problem:
    config = config or {**open_clip.get_model_config("ViT-B-32"), "vision_cfg": SMALL_VISION}
    model, names = build_clip(config, device), class_names(classes)
    tower = TextTower(model)
    tokens = tower.tokenize(names)
    contexts = {"all": (), "class": (classes,), "image": (images,)}[per]
    context = (0.02 * torch.randn(*contexts, n_ctx, tower.width)).to(device).requires_grad_()
    features_of = (images,) if per == "image" else ()
    targets = torch.randn(*features_of, classes, config["embed_dim"])
    targets = F.normalize(targets, dim=-1).to(device)

    def ours() -> Tensor:
        features = tower(context, tokens, per=per, position=position).features
        return distance(features, targets)

    def padded(cut: bool) -> Loss:
        its_tower = PaddedTower(model, names, n_ctx, cut=cut)
        if per != "image":
            return lambda: distance(its_tower(context, position), targets)

        def image_by_image() -> Iterator[Tensor]:
            for image in range(images):
                yield distance(its_tower(context[image]), targets[image])

        return image_by_image

    def exact() -> list[Tensor]:
        precise = PaddedTower(copy.deepcopy(model).double(), names, n_ctx, cut=True)
        leaf = context.detach().double().requires_grad_()
        if per == "image":
            features = torch.stack([precise.in_parts(one) for one in leaf])
        else:
            features = precise.in_parts(leaf, position)
        loss = distance(features, targets.double())
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    runs = images * classes
    rows = images * int(tokens.lengths.sum())
    if per == "class":
        rows += 1 + classes * n_ctx
    else:
        before = n_ctx // 2 if position == "middle" else n_ctx
        rows += images * (1 + before) + runs * (n_ctx - before)
    return Problem(
        sides=three_sides(ours, padded, device != "cpu" or classes <= MOST_ON_A_CPU),
        leaves=[context],
        exact=exact,
        flop=flop_of_linear_layers(rows, runs, tower.width, tower.depth),
        tolerance=1e-4,
    )


def distance(features: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(F.normalize(features, dim=-1), targets, reduction="sum")


def flop_of_linear_layers(rows: int, runs: int, width: int, depth: int) -> float:
    """Forward, and backward to the inputs, for the weights are frozen.

    Of the last block all rows need keys and values, and only the EOT of each run the rest.
    """
    products = (depth - 1) * rows * 12 + rows * 2 + runs * 10
    return 2 * 2.0 * products * width**2


def case(
    classes: int,
    *,
    full: bool = False,
    modes: tuple[str, ...] = MODES[1:],
    alone: tuple[str, ...] = (),
    **layout: Any,
) -> Case:
    name = f"{classes} classes"
    if layout.get("per") == "image":
        images = layout["images"]
        name = f"{images} image{'s' * (images > 1)} x {name}, a context each"
    elif layout.get("per") == "class":
        name += ", a context each"
    elif "position" in layout:
        name += f", name in the {layout['position']}"
    return Case(
        name,
        partial(make, classes, **layout),
        full,
        modes,
        baselines=(PADDED, CUT),
        alone=alone,
        slow=True,
        seconds=60.0 if full else 20.0,
        over=None if layout else ("classes", classes),
    )


CASES = [
    case(50, modes=MODES),
    case(100),
    case(400, full=True),
    case(MOST_ON_A_CPU, full=True, alone=(PADDED,)),
    case(1000, full=True),
    case(100, per="class", full=True),
    case(100, position="middle", full=True),
    case(100, per="image", images=8, n_ctx=4, full=True),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_text_tower(contest, case, mode):
    contest(case, mode)
