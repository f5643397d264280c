"""A small CLIP in two layouts, as the codebases that the drop-in is for have it: openai/CLIP's
(sequence first, the mask inside the blocks) and open_clip's (batch first, the mask in the call)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from open_clip import transformer as open_clip
from torch import Tensor, nn

LAYOUTS = ("openai", "open_clip")


@dataclass(frozen=True)
class Sizes:
    """Of both towers. vocabulary: its last two tokens are SOS and EOT."""

    width: int = 32
    heads: int = 2
    layers: int = 3
    joint: int = 24
    vision_width: int = 40
    vision_heads: int = 2
    vision_layers: int = 3
    patch: int = 4
    image: int = 8
    length: int = 32
    vocabulary: int = 96


VIT_B32 = Sizes(512, 8, 12, 512, 768, 12, 12, 32, 224, 77, 49408)


@dataclass(frozen=True)
class Design:
    """Which prompts the blocks hold (IVLP) or are handed (MaPLe), and how they are rounded."""

    kind: str = "CoOp"
    text_depth: int = 0
    n_text: int = 0
    vision_depth: int = 0
    n_vision: int = 0
    rounding: Callable[[Tensor], Tensor] = Tensor.half


class LayerNorm(nn.LayerNorm):
    """In the precision of its weights: fp32 in models of fp16, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int, attn_mask: Tensor | None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        parts = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", QuickGELU()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(parts))
        self.ln_2 = LayerNorm(width)
        self.attn_mask = attn_mask

    def attention(self, x: Tensor) -> Tensor:
        if self.attn_mask is not None:
            self.attn_mask = self.attn_mask.to(x)
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class _Replaces:
    """In front of a block that may get prompts of its own instead of those that come in."""

    def replace(self, x: Tensor, vectors: Tensor) -> Tensor:
        if self.attn.batch_first:
            vectors = vectors.expand(len(x), -1, -1)
            return torch.cat(self.around(x, vectors, 1), dim=1)
        vectors = vectors.expand(x.shape[1], -1, -1).transpose(0, 1)
        return torch.cat(self.around(x, vectors, 0), dim=0)

    def around(self, x: Tensor, vectors: Tensor, dim: int) -> list[Tensor]:
        n, length = vectors.shape[dim], x.shape[dim]
        vectors = self.rounding(vectors)
        if self.text_layer:
            return [x.narrow(dim, 0, 1), vectors, x.narrow(dim, 1 + n, length - 1 - n)]
        return [x.narrow(dim, 0, length - n), vectors]


class HoldsPrompts(_Replaces):
    """IVLP's, PromptSRC's and VPT's: every block but the first has a parameter."""

    def hold(self, layer: int, vectors: int, depth: int, text: bool, rounding: Any) -> None:
        self.text_layer = text
        self.rounding = rounding
        self.add_prompt = 0 < layer < depth
        if self.add_prompt:
            setattr(self, "n_ctx_text" if text else "n_ctx_visual", vectors)
            self.VPT_shallow = nn.Parameter(0.2 * torch.randn(vectors, self.attn.embed_dim))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        if self.add_prompt:
            x = self.replace(x, self.VPT_shallow)
        return super().forward(x, **options)


class TakesPrompts(_Replaces):
    """MaPLe's: a list goes through the blocks, with a counter of how many of it were used."""

    def hold(self, layer: int, vectors: int, depth: int, text: bool, rounding: Any) -> None:
        self.text_layer = text
        self.rounding = rounding
        self.compound_prompt_nctx = vectors
        self.first_layer = layer == 0

    def forward(self, inputs: list[Any], **options: Any) -> list[Any]:
        x, deeper, counter = inputs
        if not self.first_layer and counter < len(deeper):
            x = self.replace(x, deeper[counter])
            counter += 1
        return [super().forward(x, **options), deeper, counter]


class IvlpBlock(HoldsPrompts, ResidualAttentionBlock):
    pass


class MapleBlock(TakesPrompts, ResidualAttentionBlock):
    pass


class OpenClipIvlpBlock(HoldsPrompts, open_clip.ResidualAttentionBlock):
    pass


class OpenClipMapleBlock(TakesPrompts, open_clip.ResidualAttentionBlock):
    pass


class Transformer(nn.Module):
    def __init__(self, blocks: list[nn.Module], width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = len(blocks)
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: Any) -> Any:
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    """Prompts, where it has any, stand behind the patches."""

    def __init__(self, sizes: Sizes, design: Design) -> None:
        super().__init__()
        width = sizes.vision_width
        self.input_resolution = sizes.image
        self.output_dim = sizes.joint
        self.rounding = design.rounding
        self.conv1 = nn.Conv2d(3, width, sizes.patch, stride=sizes.patch, bias=False)
        if design.vision_depth and design.kind == "IVLP":
            self.VPT = nn.Parameter(0.2 * torch.randn(design.n_vision, width))
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        places = (sizes.image // sizes.patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(places, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(
            blocks(design, sizes.vision_layers, width, sizes.vision_heads, text=False), width
        )
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, sizes.joint))

    def forward(self, image: Tensor, shared_ctx: Any = None, deeper: Any = None) -> Tensor:
        x = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        first = getattr(self, "VPT", shared_ctx)
        if first is not None:
            x = torch.cat([x, self.rounding(first.expand(len(x), -1, -1))], dim=1)
        x = self.ln_pre(x).transpose(0, 1)
        x = self.transformer(x) if deeper is None else self.transformer([x, deeper, 0])[0]
        return self.ln_post(x[0]) @ self.proj


def blocks(
    design: Design,
    layers: int,
    width: int,
    heads: int,
    *,
    text: bool,
    layout: str = "openai",
    mask: Tensor | None = None,
) -> list[nn.Module]:
    depth = design.text_depth if text else design.vision_depth
    vectors = design.n_text if text else design.n_vision
    if layout == "openai":
        kinds = {"IVLP": IvlpBlock, "MaPLe": MapleBlock, "CoOp": ResidualAttentionBlock}
        found = [kinds[design.kind](width, heads, mask) for _ in range(layers)]
    else:
        plain = open_clip.ResidualAttentionBlock
        kinds = {"IVLP": OpenClipIvlpBlock, "MaPLe": OpenClipMapleBlock, "CoOp": plain}
        norm = open_clip.LayerNormFp32
        found = [kinds[design.kind](width, heads, norm_layer=norm) for _ in range(layers)]
    for layer, block in enumerate(found):
        if isinstance(block, _Replaces):
            block.hold(layer, vectors, depth, text, design.rounding)
    return found


class Clip(nn.Module):
    """Frozen, with random weights. ``dtype`` is that of the image tower's first layer, as in
    openai/CLIP."""

    def __init__(self, layout: str, sizes: Sizes, design: Design) -> None:
        super().__init__()
        width, length = sizes.width, sizes.length
        self.layout = layout
        self.context_length = length
        self.visual = VisionTransformer(sizes, design)
        mask = torch.full((length, length), float("-inf")).triu(1)
        made = blocks(design, sizes.layers, width, sizes.heads, text=True, layout=layout, mask=mask)
        if layout == "openai":
            self.transformer = Transformer(made, width)
        else:
            self.transformer = open_clip.Transformer(width, 0, sizes.heads)
            self.transformer.resblocks = nn.ModuleList(made)
            self.register_buffer("attn_mask", mask, persistent=False)
        self.token_embedding = nn.Embedding(sizes.vocabulary, width)
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(length, width))
        self.ln_final = LayerNorm(width) if layout == "openai" else open_clip.LayerNormFp32(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, sizes.joint))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        nn.init.normal_(self.token_embedding.weight, std=0.2)
        for block in (*self.transformer.resblocks, *self.visual.transformer.resblocks):
            nn.init.normal_(block.attn.in_proj_weight, std=block.attn.embed_dim**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image.type(self.dtype))

    def encode_text(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens).type(self.dtype)
        x = x + self.positional_embedding.type(self.dtype)
        if self.layout == "openai":
            x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        else:
            x = self.transformer(x, attn_mask=self.attn_mask)
        x = self.ln_final(x).type(self.dtype)
        return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_image(image), self.encode_text(tokens)


def convert_weights(model: nn.Module) -> None:
    """To fp16 what openai/CLIP has in it: layers with weights, not embeddings and norms."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.half()
        for name in ("text_projection", "proj"):
            if isinstance(parameter := getattr(module, name, None), nn.Parameter):
                parameter.data = parameter.data.half()


class _RoundedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        return vectors.half().to(vectors.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def rounded_forward(vectors: Tensor) -> Tensor:
    """``.half()`` in a model of fp32, but that the gradient isn't rounded: there it is, in each
    class's part, before their sum."""
    return _RoundedForward.apply(vectors)
