"""What the text tower reads of a CLIP model: a small adapter, so that every layout looks alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TextModel:
    """The parts of a causal CLIP text tower. Nothing is copied: the modules are the model's own.

    token_embedding: [V, d]. positional_embedding: [L, d]. blocks: called as
    ``block(x, attn_mask=mask)`` on [N, L, d] if ``batch_first``, else on [L, N, d].
    ln_final: on [..., d]. text_projection: [d, D], a Linear, or None.
    """

    model: nn.Module
    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    blocks: Sequence[nn.Module]
    ln_final: nn.Module
    text_projection: nn.Parameter | nn.Linear | None
    batch_first: bool

    @classmethod
    def of(cls, model: nn.Module) -> TextModel:
        """Read an open_clip CLIP, or a CustomTextCLIP whose text tower is causal and reads EOT.

        Raises ValueError with the reason for a model whose text tower is of another kind.
        """
        text = model
        if not hasattr(model, "token_embedding"):
            text = getattr(model, "text", None)
        parts = ("token_embedding", "positional_embedding", "transformer", "ln_final")
        missing = [part for part in parts if not hasattr(text, part)]
        if missing:
            raise ValueError(
                f"model: {type(model).__name__} has no {', '.join(missing)}, so its text tower "
                "is not a CLIP transformer that prompts can be learned for"
            )
        if getattr(text, "attn_mask", None) is None:
            raise ValueError(
                "model: its text tower is not causal (no attention mask, as in SigLIP), "
                "which is not supported yet"
            )
        if getattr(text, "cls_emb", None) is not None:
            raise ValueError(
                "model: its text tower reads a class token instead of EOT (as in CoCa), "
                "which is not supported yet"
            )
        pool = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", "argmax")
        if pool not in ("argmax", "eos"):
            raise ValueError(
                f"model: its text tower pools by {pool!r}, expected the EOT position "
                "('argmax' or 'eos')"
            )
        return cls(
            model=model,
            token_embedding=text.token_embedding,
            positional_embedding=text.positional_embedding,
            blocks=list(text.transformer.resblocks),
            ln_final=text.ln_final,
            text_projection=text.text_projection,
            batch_first=getattr(text.transformer, "batch_first", False),
        )

    def why_padded(self) -> str | None:
        return None

    def qkv(self, layer: int, x: Tensor) -> Tensor:
        attn = self.blocks[layer].attn
        x = self.blocks[layer].ln_1(x)
        x = nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias)
        return x.unflatten(-1, (3, attn.num_heads, -1))

    def finish_block(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        block = self.blocks[layer]
        out = block.attn.out_proj
        x = x + block.ls_1(nn.functional.linear(attended.flatten(1), out.weight, out.bias))
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    def weights(self) -> list[Tensor]:
        """The parameters that text features come from."""
        outside = ("visual.", "vision_", "visual_", "logit_")
        named = self.model.named_parameters()
        return [weight for name, weight in named if not name.startswith(outside)]

    def pool(self, x: Tensor) -> Tensor:
        return self.project(self.ln_final(x))

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        return self.token_embedding.weight.shape[1]

    @property
    def context_length(self) -> int:
        return self.positional_embedding.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the blocks compute in (half-precision checkpoints keep it in their linears)."""
        return next(
            p for n, p in self.blocks[0].named_parameters() if n.endswith("weight") and p.ndim == 2
        ).dtype

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    def run_block(self, layer: int, x: Tensor, mask: Tensor) -> Tensor:
        """Block ``layer`` on x [N, L, d] with an additive mask [L, L]."""
        if self.batch_first:
            return self.blocks[layer](x, attn_mask=mask)
        return self.blocks[layer](x.transpose(0, 1), attn_mask=mask).transpose(0, 1)

    def project(self, x: Tensor) -> Tensor:
        """Hidden states [..., d] after ``ln_final`` to the joint space [..., D]."""
        if self.text_projection is None:
            return x
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(x)
        return x @ self.text_projection
