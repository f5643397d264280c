"""What the prompted image tower reads of a model: a small adapter, so that every layout looks
alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlfast.clip.block import (
    block_kind,
    differ,
    finish_block,
    interference,
    is_read,
    project_keys_values,
    project_qkv,
    project_queries,
    why_block_whole,
)

# What these compute has been read; any other class is tried before it is trusted.
_READ = {
    "open_clip.model.CLIP",
    "open_clip.model.CustomTextCLIP",
    "open_clip.transformer.VisionTransformer",
    "open_clip.transformer.Transformer",
    "open_clip.transformer.ResidualAttentionBlock",
}
_PARTS = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post")


@dataclass(frozen=True, eq=False)
class VisionModel:
    """The parts of a model's image tower, a transformer of patches behind a class token. Nothing is
    copied: the modules are the model's own.

    model: whose ``encode_image`` it is. visual: the tower. blocks: its layers; they take [B, L, d]
    if ``batch_first``, else [L, B, d]. averages: whether the patches' mean is read rather than the
    class token.
    """

    model: nn.Module
    visual: nn.Module
    blocks: Sequence[nn.Module]
    batch_first: bool
    averages: bool
    _tried: dict[nn.Module, str | None] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> VisionModel:
        """Read the image tower of open_clip's VisionTransformer or of OpenAI's layout.

        Raises ValueError with the reason for an image tower that takes no prompts.
        """
        visual = getattr(model, "visual", None)
        missing = [part for part in _PARTS if not hasattr(visual, part)]
        if not (hasattr(visual, "image_size") or hasattr(visual, "input_resolution")):
            missing.append("image_size")
        blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
        if missing or not blocks:
            what = type(model if visual is None else visual).__name__
            raise ValueError(
                f"model: the image tower of {what} has no "
                f"{', '.join(missing or ['transformer.resblocks'])}, so it is no transformer of "
                "patches that takes prompts"
            )
        if getattr(visual, "attn_pool", None) is not None:
            raise ValueError(
                f"model: the image tower of {type(model).__name__} pools by attention, "
                "which prompts are not defined for"
            )
        pool_type = getattr(visual, "pool_type", "tok")
        if pool_type not in ("tok", "avg"):
            raise ValueError(
                f"model: the image tower of {type(model).__name__} has pool_type {pool_type!r}; "
                "prompts need one feature an image, of the class token ('tok') or a mean ('avg')"
            )
        attn = getattr(blocks[0], "attn", None)
        batch_first = getattr(visual.transformer, "batch_first", getattr(attn, "batch_first", True))
        return cls(model, visual, blocks, batch_first, pool_type == "avg")

    @property
    def width(self) -> int:
        return self.visual.class_embedding.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.visual.conv1.weight.device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        visual = self.visual
        size = visual.image_size if hasattr(visual, "image_size") else visual.input_resolution
        return (size, size) if isinstance(size, int) else tuple(size)

    def encode(self, pixels: Tensor) -> Tensor:
        """Features [B, D], not normalised, by the model itself."""
        if "normalize" in signature(self.model.encode_image).parameters:
            return self.model.encode_image(pixels, normalize=False)
        return self.model.encode_image(pixels)

    def embed(self, pixels: Tensor) -> Tensor:
        """The class token and the patches with their positions, before ``ln_pre``: [B, N, d]."""
        visual = self.visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        start = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        return torch.cat([start, x], dim=1) + visual.positional_embedding.to(x.dtype)

    def run_block(self, layer: int, x: Tensor, shared: Tensor | None, rows: slice) -> Tensor:
        """Block ``layer`` on rows x [B, L, d], of which those at ``rows`` are needed afterwards.

        shared: [n, d], rows of every image that are seen and go no further: they need neither
        queries nor the MLP, and the same keys and values serve all images.
        """
        block = self.blocks[layer]
        normed = block.ln_1(x)
        if rows == slice(None):
            query, key, value = project_qkv(block.attn, normed).unbind(-3)
        else:
            query = project_queries(block.attn, normed[:, rows])
            key, value = project_keys_values(block.attn, normed).unbind(-3)
        if shared is not None:
            both = project_keys_values(block.attn, block.ln_1(shared))
            both = both.expand(len(x), -1, -1, -1, -1).unbind(-3)
            key = torch.cat([key, both[0]], dim=1)
            value = torch.cat([value, both[1]], dim=1)
        attended = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        return finish_block(block, x[:, rows], attended.transpose(1, 2))

    def pool(self, x: Tensor) -> Tensor:
        """Features [B, D] of what is read, [B, R, d], after the last block."""
        visual = self.visual
        late = getattr(visual, "final_ln_after_pool", False)
        x = visual.ln_post(x.mean(dim=1)) if late else visual.ln_post(x).mean(dim=1)
        projection = getattr(visual, "proj", None)
        return x if projection is None else x @ projection

    @property
    def read(self) -> slice:
        """Which rows of [class token, patches] features come from."""
        return slice(1, None) if self.averages else slice(0, 1)

    def why_whole(self) -> str | None:
        """None where blocks may be taken apart; else why the model's own modules must be called on
        whole sequences. Asked at each call, since hooks come and go."""
        visual = self.visual
        if "encode_image" in self.model.__dict__:
            return "its encode_image was replaced"
        for name, module in (("visual", visual), ("visual.transformer", visual.transformer)):
            if found := interference(module):
                return f"{name} {found}"
        dropout = getattr(visual, "patch_dropout", None)
        if dropout is not None and dropout.training and getattr(dropout, "prob", 0) > 0:
            return "it drops patches in training mode"
        for layer, block in enumerate(self.blocks):
            if found := why_block_whole(block):
                return f"visual.transformer.resblocks[{layer}]{found}"
            if block not in self._tried:
                self._tried[block] = self._try_block(layer)
            if found := self._tried[block]:
                return f"visual.transformer.resblocks[{layer}] {found}"
        if self.model not in self._tried:
            self._tried[self.model] = self._try_model()
        return self._tried[self.model]

    def _try_block(self, layer: int) -> str | None:
        """Why block ``layer`` does not compute what ``run_block`` does, or None."""
        block = self.blocks[layer]
        if is_read(block, _READ):
            return None
        kind = block_kind(block)
        for other, verdict in self._tried.items():
            if block_kind(other) == kind:
                return verdict
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 6, self.width, generator=generator).to(self.device, self.dtype)

        def theirs() -> Tensor:
            made = block(x if self.batch_first else x.transpose(0, 1))
            return (made if self.batch_first else made.transpose(0, 1)) - x

        return differ(
            lambda: self.run_block(layer, x, None, slice(None)) - x,
            theirs,
            # What a block adds may be far smaller than what it adds it to, whose rounding remains.
            slack=4 * torch.finfo(x.dtype).eps * float(x.abs().max()),
            device=x.device,
            what=f"is {type(block).__name__}, which computes something else than CLIP's block",
        )

    def _try_model(self) -> str | None:
        """Why the model does not compute what its parts do when taken one by one, or None."""
        if all(is_read(m, _READ) for m in (self.model, self.visual, self.visual.transformer)):
            return None
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, 3, *self.image_size, generator=generator)
        pixels = pixels.to(self.device, self.dtype)

        def ours() -> Tensor:
            x = self.visual.ln_pre(self.embed(pixels))
            for layer in range(len(self.blocks)):
                x = self.run_block(layer, x, None, slice(None))
            return self.pool(x[:, self.read])

        return differ(
            ours,
            lambda: self.encode(pixels),
            slack=0.0,
            device=pixels.device,
            what=f"its {type(self.visual).__name__} computes something else than CLIP's image "
            "tower",
        )
