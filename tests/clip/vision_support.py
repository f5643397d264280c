"""Small random models of every layout that an image tower can have, and the plain way to prompt
them."""

from __future__ import annotations

import open_clip
import torch
from torch import nn

from tests.clip.support import TEXT, Fp32LayerNorm, OpenAIBlock, OpenAIClip, shaken

VISION = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8}


def vision_clip(cast_dtype=None, quick_gelu=False, embed_dim=24, **vision) -> nn.Module:
    """open_clip's CLIP with these options of its image tower: 16 patches, 4 blocks."""
    return shaken(
        open_clip.model.CLIP(
            embed_dim=embed_dim,
            vision_cfg={**VISION, **vision},
            text_cfg=TEXT,
            cast_dtype=cast_dtype,
            quick_gelu=quick_gelu,
        )
    )


class OpenAIVision(nn.Module):
    """The image tower of OpenAI's CLIP class."""

    def __init__(self, size=32, patch=8, width=32, layers=4, heads=2, output_dim=24):
        super().__init__()
        self.input_resolution = size
        self.output_dim = output_dim
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        count = (size // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(torch.randn(count, width) * width**-0.5)
        self.ln_pre = Fp32LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(
            *[MaskFreeBlock(width, heads, None) for _ in range(layers)]
        )
        self.ln_post = Fp32LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, output_dim) * width**-0.5)

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        start = self.class_embedding.to(x.dtype) + torch.zeros_like(x[:, :1])
        x = torch.cat([start, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.ln_pre(x).permute(1, 0, 2)
        x = self.transformer.resblocks(x).permute(1, 0, 2)
        return self.ln_post(x[:, 0, :]) @ self.proj


class MaskFreeBlock(OpenAIBlock):
    def attention(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


class OpenAIFullClip(OpenAIClip):
    """OpenAI's CLIP class, both halves."""

    def __init__(self, vision=OpenAIVision):
        super().__init__()
        self.visual = vision()

    def convert_weights(self):
        super().convert_weights()
        self.visual.conv1.half()
        self.visual.proj.data = self.visual.proj.data.half()
        return self

    def encode_image(self, image):
        return self.visual(image.type(self.visual.conv1.weight.dtype))


def openai_clip() -> nn.Module:
    return shaken(OpenAIFullClip())


def plain_features(model, pixels, prompts):
    """Prompts joined to the sequence, whole blocks on whole sequences, as METHODS has it: behind
    the patches, before ln_pre; a deeper block drops the previous outputs and takes its own."""
    visual = model.visual
    x = visual.conv1(pixels.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
    start = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([start, x], dim=1) + visual.positional_embedding.to(x.dtype)
    own = x.shape[1]
    if len(prompts):
        x = torch.cat([x, prompts[0].to(x.dtype).expand(len(x), -1, -1)], dim=1)
    x = visual.ln_pre(x)
    first = getattr(visual.transformer, "batch_first", False)
    for layer, block in enumerate(visual.transformer.resblocks):
        if 0 < layer < len(prompts):
            new = prompts[layer].to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([x[:, :own], new], dim=1)
        x = block(x) if first else block(x.transpose(0, 1)).transpose(0, 1)
    if getattr(visual, "pool_type", "tok") == "tok":
        pooled = visual.ln_post(x[:, 0])
    elif visual.final_ln_after_pool:
        pooled = visual.ln_post(x[:, 1:own].mean(dim=1))
    else:
        pooled = visual.ln_post(x[:, 1:own]).mean(dim=1)
    return pooled if visual.proj is None else pooled @ visual.proj
