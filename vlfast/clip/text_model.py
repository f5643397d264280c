"""What the text tower reads of a model: a small adapter, so that every layout looks alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlfast.clip.block import (
    block_kind,
    differ,
    finish_block,
    interference,
    is_read,
    project_qkv,
    why_block_whole,
)

# What these compute has been read; any other class is tried before it is trusted.
_READ = {
    "open_clip.model.CLIP",
    "open_clip.model.CustomTextCLIP",
    "open_clip.coca_model.CoCa",
    "open_clip.transformer.TextTransformer",
    "open_clip.transformer.Transformer",
    "open_clip.transformer.ResidualAttentionBlock",
}
# Parameters of a model that no feature comes from.
OF_LOGITS = ("logit_scale", "logit_bias")


@dataclass(frozen=True, eq=False)
class TextModel:
    """The parts of a model's text tower. Nothing is copied: the modules are the model's own.

    model: whose ``encode`` it is. tower: the module that holds the parts, the model itself or one
    in it. token_embedding: [V, d]. blocks: the layers, none where they can't be reached; they take
    [N, L, d] if ``batch_first``, else [L, N, d]. ln_final: on [..., d]. context_length: the most
    tokens in a sequence; fixed_length: whether each is padded to that many. causal: whether no
    token sees a later one. pool_type: which token is read, by open_clip's names. pad_id, eos_id:
    what the tower itself takes for padding and for the end. whole: why the tower as such needs
    whole sequences, or None.
    """

    model: nn.Module
    tower: nn.Module
    token_embedding: nn.Module
    blocks: Sequence[nn.Module]
    batch_first: bool
    ln_final: nn.Module | None
    context_length: int
    fixed_length: bool
    causal: bool
    pool_type: str
    pad_id: int | None
    eos_id: int | None
    whole: str | None
    _tried: dict[nn.Module, str | None] = field(default_factory=dict, repr=False)
    _measured: dict[Hashable, int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> TextModel:
        """Read a CLIP of open_clip (CLIP, CustomTextCLIP, CoCa), of OpenAI's layout or of Hugging
        Face's (CLIPModel, SiglipModel).

        Raises ValueError with the reason for a model without a text tower that we can read.
        """
        if hasattr(model, "get_text_features") and hasattr(model, "text_model"):
            return cls(**_hugging_face_clip(model))
        tower = model if hasattr(model, "token_embedding") else getattr(model, "text", None)
        if hasattr(getattr(tower, "transformer", None), "get_input_embeddings"):
            return cls(**_hugging_face_encoder(model, tower))
        text = cls(**_clip(model, tower))
        # The first answer is the slow one: it tries what it does not know.
        text.why_padded()
        return text

    # Parameters are looked up where they are, since loading a state dict may put others there.

    @property
    def positional_embedding(self) -> Tensor | None:
        """[L, d], or None where the tower adds positions in another way."""
        return getattr(self.tower, "positional_embedding", None)

    @property
    def text_projection(self) -> Tensor | nn.Module | None:
        """[d, D], a module, or None."""
        return getattr(self.tower, "text_projection", None)

    @property
    def width(self) -> int:
        return self.token_embedding.weight.shape[1]

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the blocks compute in (half-precision checkpoints keep it in their linears)."""
        weights = (p for block in self.blocks for p in block.parameters() if p.ndim == 2)
        return next(
            (p for p in weights if p.is_floating_point()), self.token_embedding.weight
        ).dtype

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    def encode(self, ids: Tensor) -> Tensor:
        """Features [C, D], not normalised, of whole sequences [C, L], by the model itself."""
        if hasattr(self.model, "get_text_features"):
            features = self.model.get_text_features(input_ids=ids)
            features = getattr(features, "pooler_output", features)
        elif not hasattr(self.model, "encode_text"):
            features = self.model(ids)
        elif "normalize" in signature(self.model.encode_text).parameters:
            features = self.model.encode_text(ids, normalize=False)
        else:
            features = self.model.encode_text(ids)
        return features[0] if isinstance(features, tuple) else features

    def qkv(self, layer: int, x: Tensor) -> Tensor:
        """Queries, keys and values of rows [M, d] in block ``layer``: [M, 3, H, E]."""
        block = self.blocks[layer]
        return project_qkv(block.attn, block.ln_1(x))

    def finish_block(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """What block ``layer`` makes of rows x [M, d] that attended to [M, H, E]: [M, d]."""
        return finish_block(self.blocks[layer], x, attended)

    def pool(self, x: Tensor) -> Tensor:
        """Rows [R, d] at EOT, after the last block, to the joint space: [R, D]."""
        x, projection = self.ln_final(x), self.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Module) else x @ projection

    def modules(self) -> list[nn.Module]:
        """Those that text features come from, as they are at this moment, at least."""
        outside = ("visual", "vision_", "visual_")
        named = self.model.named_modules()
        return [module for name, module in named if not name.startswith(outside)]

    def weights(self) -> list[Tensor]:
        """The parameters of ``modules`` that features come from."""
        own = [module.named_parameters(recurse=False) for module in self.modules()]
        named = itertools.chain.from_iterable(own)
        return [weight for name, weight in named if name not in OF_LOGITS]

    def measured(self, key: Hashable, measure: Callable[[], int]) -> int:
        """What ``measure`` found in this model when first asked for ``key``."""
        if key not in self._measured:
            self._measured[key] = measure()
        return self._measured[key]

    def why_padded(self) -> str | None:
        """None where rows of tokens may go through the blocks one run behind another; else why the
        model needs whole sequences. Asked at each call, since hooks come and go."""
        if self.whole is not None:
            return self.whole
        called = self.tower is not self.model or not hasattr(self.model, "encode_text")
        if called and (found := interference(self.tower)):
            return f"its text tower {found}"
        if found := interference(self.tower.transformer):
            return f"transformer {found}"
        for layer, block in enumerate(self.blocks):
            if found := why_block_whole(block):
                return f"transformer.resblocks[{layer}]{found}"
            if block not in self._tried:
                self._tried[block] = self._try_block(layer)
            if found := self._tried[block]:
                return f"transformer.resblocks[{layer}] {found}"
        if self.model not in self._tried:
            self._tried[self.model] = self._try_tower()
        return self._tried[self.model]

    def _try_block(self, layer: int) -> str | None:
        """Why block ``layer`` does not compute what ``qkv`` and ``finish_block`` do, or None."""
        block = self.blocks[layer]
        if _is_read(block):
            return None
        kind = block_kind(block)
        for other, verdict in self._tried.items():
            if block_kind(other) == kind:
                return verdict
        mask = getattr(block, "attn_mask", None)
        length = 8 if mask is None else mask.shape[-1]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, length, self.width, generator=generator).to(self.device, self.dtype)

        def theirs() -> Tensor:
            given = x if self.batch_first else x.transpose(0, 1)
            made = block(given) if hasattr(block, "attn_mask") else block(given, attn_mask=causal)
            return (made if self.batch_first else made.transpose(0, 1)) - x

        def ours() -> Tensor:
            return torch.stack([self._run_rows(layer, rows) - rows for rows in x])

        causal = torch.full((length, length), -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        return differ(
            ours,
            theirs,
            # What a block adds may be far smaller than what it adds it to, whose rounding remains.
            slack=4 * torch.finfo(x.dtype).eps * float(x.abs().max()),
            device=x.device,
            what=f"is {type(block).__name__}, which computes something else than CLIP's block",
        )

    def _try_tower(self) -> str | None:
        """Why the tower does not compute what its parts do when taken one by one, or None."""
        parts = (self.model, self.tower, self.tower.transformer)
        if all(_is_read(part) for part in parts):
            return None
        words = self.token_embedding.weight.shape[0]
        eot = self.context_length // 2
        ids = torch.zeros(1, self.context_length, dtype=torch.int64)
        end = self.eos_id if self.pool_type == "eos" else words - 1
        before = torch.randint(words - 1, (eot,), generator=torch.Generator().manual_seed(0))
        ids[0, :eot] = before.where(before != end, 0)
        ids[0, eot] = end
        ids = ids.to(self.device)

        def ours() -> Tensor:
            x = self.token_embedding(ids[0]).to(self.dtype)
            x = x + self.positional_embedding.to(self.dtype)
            for layer in range(self.depth):
                x = self._run_rows(layer, x)
            return self.pool(x[eot : eot + 1])

        return differ(
            ours,
            lambda: self.encode(ids),
            slack=0.0,
            device=ids.device,
            what=f"its {type(self.model).__name__} computes something else than CLIP's text tower",
        )

    def _run_rows(self, layer: int, x: Tensor) -> Tensor:
        """Block ``layer`` on one sequence [L, d], each token seeing those up to itself."""
        query, key, value = self.qkv(layer, x).unbind(1)
        attended = functional.scaled_dot_product_attention(
            query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=True
        )
        return self.finish_block(layer, x, attended.transpose(0, 1))


def _clip(model: nn.Module, tower: nn.Module | None) -> dict[str, Any]:
    """What TextModel holds of open_clip's layout, or of OpenAI's, which it follows."""
    parts = ("token_embedding", "positional_embedding", "transformer", "ln_final")
    missing = [part for part in parts if not hasattr(tower, part)]
    if missing:
        raise ValueError(
            f"model: {type(model).__name__} has no {', '.join(missing)}, so its text tower "
            "is not a CLIP transformer that prompts can be learned for"
        )
    transformer = tower.transformer
    blocks = getattr(transformer, "resblocks", None)
    if not blocks:
        raise ValueError(f"model: {type(model).__name__} has no transformer.resblocks to learn for")
    # In OpenAI's layout each block holds the mask, and nn.MultiheadAttention the order of axes.
    attn = getattr(blocks[0], "attn", None)
    mask = getattr(tower, "attn_mask", getattr(blocks[0], "attn_mask", None))
    batch_first = getattr(transformer, "batch_first", getattr(attn, "batch_first", True))
    class_token = getattr(tower, "cls_emb", None) is not None
    pool_type = getattr(tower, "text_pool_type", getattr(tower, "pool_type", "argmax"))
    return {
        "model": model,
        "tower": tower,
        "token_embedding": tower.token_embedding,
        "blocks": blocks,
        "batch_first": batch_first,
        "ln_final": tower.ln_final,
        "context_length": len(tower.positional_embedding) - class_token,
        "fixed_length": True,
        "causal": mask is not None,
        "pool_type": "last" if class_token else pool_type,
        "pad_id": getattr(tower, "pad_id", None),
        "eos_id": getattr(tower, "text_eos_id", getattr(tower, "eos_id", None)),
        "whole": _why_whole(mask, class_token, pool_type),
    }


def _hugging_face_clip(model: nn.Module) -> dict[str, Any]:
    """What TextModel holds of transformers' CLIPModel and SiglipModel."""
    kind, config = model.config.model_type, model.config.text_config
    if kind not in ("clip", "metaclip_2", "siglip", "siglip2"):
        raise ValueError(
            f"model: {type(model).__name__} is a Hugging Face model of type {kind!r}, "
            "of which clip, metaclip_2, siglip and siglip2 serve"
        )
    tower, causal = model.text_model, "siglip" not in kind
    return {
        "model": model,
        "tower": tower,
        "token_embedding": tower.embeddings.token_embedding,
        "blocks": tower.encoder.layers,
        "batch_first": True,
        "ln_final": tower.final_layer_norm,
        "context_length": config.max_position_embeddings,
        # SigLIP reads the last token, whatever it is.
        "fixed_length": not causal,
        "causal": causal,
        "pool_type": "eos" if causal else "last",
        "pad_id": config.pad_token_id,
        "eos_id": config.eos_token_id,
        "whole": "it is a Hugging Face model",
    }


def _hugging_face_encoder(model: nn.Module, tower: nn.Module) -> dict[str, Any]:
    """What TextModel holds of open_clip's HFTextEncoder."""
    config, inner = tower.config, tower.transformer
    inside = getattr(inner, "encoder", inner)
    names = [name for name in ("layers", "layer", "block") if hasattr(inside, name)]
    # Where positions are relative (T5) there is no limit but what such models were trained with.
    positions = getattr(config, "max_position_embeddings", None) or 512
    if "roberta" in config.model_type:
        positions -= config.pad_token_id + 1
    return {
        "model": model,
        "tower": tower,
        "token_embedding": inner.get_input_embeddings(),
        "blocks": getattr(inside, names[0]) if names else (),
        "batch_first": True,
        "ln_final": None,
        "context_length": positions,
        # It masks the padding.
        "fixed_length": False,
        "causal": False,
        "pool_type": "none",
        "pad_id": config.pad_token_id,
        "eos_id": config.eos_token_id,
        "whole": "its text tower is a Hugging Face model",
    }


def _why_whole(mask: Tensor | None, class_token: bool, pool_type: str) -> str | None:
    """Why a tower with these traits can't be run without padding, or None."""
    if mask is None:
        return "its text tower is not causal (no attention mask), so a prefix can't be shared"
    if mask.ndim != 2 or not torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1)):
        return "its text tower has an attention mask that is not CLIP's causal one"
    if class_token:
        return "its text tower reads a class token behind the padding (as in CoCa)"
    if pool_type not in ("argmax", "eos"):
        return f"it pools the {pool_type} token"
    return None


def _is_read(module: nn.Module) -> bool:
    return is_read(module, _READ) and "encode_text" not in module.__dict__
