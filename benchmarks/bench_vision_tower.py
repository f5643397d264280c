"""Deep visual prompts in ViT-B/32's image tower: image features and the gradient to the prompts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import EAGER, MODES, OURS, Case, Problem
from vlfast.clip.vision_tower import VisionTower

# The text tower is of no interest here.
SMALL_TEXT = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}


def make(
    images: int,
    tokens: int,
    depth: int,
    device: str,
    *,
    config: Mapping[str, Any] | None = None,
) -> Problem:
    config = config or {**open_clip.get_model_config("ViT-B-32"), "text_cfg": SMALL_TEXT}
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config, quick_gelu=True).to(device).eval()
    model.requires_grad_(False)
    tower = VisionTower(model)
    pixels = torch.randn(images, 3, *model.visual.image_size, device=device)
    prompts = [torch.randn(tokens, tower.width, device=device) * 0.02 for _ in range(depth)]
    prompts = [vectors.requires_grad_() for vectors in prompts]
    targets = F.normalize(torch.randn(images, config["embed_dim"], device=device), dim=-1)

    def exact() -> list[Tensor]:
        precise = copy.deepcopy(model.visual).double()
        leaves = [vectors.detach().double().requires_grad_() for vectors in prompts]
        features = joined(precise, pixels.double(), leaves)
        loss = distance(features, targets.double())
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    return Problem(
        sides={
            OURS: lambda: distance(tower(pixels, prompts), targets),
            EAGER: lambda: distance(joined(model.visual, pixels, prompts), targets),
        },
        leaves=prompts,
        exact=exact,
        tolerance=1e-4,
    )


def joined(visual: nn.Module, pixels: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """What the methods' own code does: prompts in the sequence of every image, whole blocks."""
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = x + visual.positional_embedding
    patches = x.shape[1]
    x = visual.ln_pre(torch.cat([x, prompts[0].expand(len(x), -1, -1)], dim=1))
    for layer, block in enumerate(visual.transformer.resblocks):
        if 0 < layer < len(prompts):
            own = prompts[layer].expand(len(x), -1, -1)
            x = torch.cat([x[:, :patches], own], dim=1)
        x = block(x)
    return visual.ln_post(x[:, 0]) @ visual.proj


def distance(features: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(F.normalize(features, dim=-1), targets, reduction="sum")


def case(images: int, tokens: int, depth: int, *, full: bool = False) -> Case:
    return Case(
        f"{images} images, {tokens} prompts in {depth} block{'s' * (depth > 1)}",
        partial(make, images, tokens, depth),
        full=full,
        slow=True,
        seconds=15.0,
    )


CASES = [
    case(8, 8, 12),
    case(4, 2, 9),
    case(4, 4, 9, full=True),
    case(8, 50, 12, full=True),
    case(8, 8, 1, full=True),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_vision_tower(contest, case, mode):
    contest(case, mode)
