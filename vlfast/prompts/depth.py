"""How deep prompts go: blocks of the towers, and options that count tokens and blocks."""

from __future__ import annotations

import torch
from torch import nn

from vlfast.clip.models import ClipModel
from vlfast.prompts.context import INIT_STD, check_count


def tower_blocks(clip: ClipModel) -> tuple[int, int]:
    """How many blocks of the text tower and of the image tower can get prompts of their own; 0 for
    an image tower that takes none, such as a ResNet."""
    try:
        image = clip.vision_tower.depth
    except ValueError:
        image = 0
    return clip.text_tower.depth, image


def check_text_depth(clip: ClipModel, depth: int) -> None:
    check_count("depth", depth, clip.text_tower.depth, "the blocks of the text tower")


def check_visual_depth(clip: ClipModel, depth: int, option: str = "visual_depth") -> None:
    check_count(option, depth, clip.vision_tower.depth, "the blocks of the image tower")


def random_prompts(count: int, tokens: int, width: int) -> nn.ParameterList:
    """One fp32 tensor [tokens, width] a block, from N(0, 0.02)."""
    return nn.ParameterList(torch.randn(tokens, width) * INIT_STD for _ in range(count))
