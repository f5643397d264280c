"""The image tower with prompts: image features as a function of learned tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from vlfast.clip.vision_model import VisionModel


class VisionTower:
    """Encodes images with learned tokens beside their patches, by the image tower of a CLIP: deep
    visual prompts (VPT, arXiv 2203.12119, section 3.2) where CLIP's prompt learners put them.

    Prompts stand behind the patches, after the positional embedding and before ``ln_pre``. The
    outputs of prompts that the next block replaces are never read, and all images see the same
    ones: so they need no queries and no MLP, and their keys and values are computed once for the
    whole batch. In the last block only what is pooled goes on. Features and gradients are those of
    whole sequences. A model with hooks on its blocks, or with blocks of another kind, runs its own
    modules on whole sequences instead; ``explain()`` tells.

    The model's own modules do the work; freeze it first. model: an open_clip CLIP or
    CustomTextCLIP with a VisionTransformer, or an openai/CLIP. Raises ValueError, with the reason,
    for an image tower that takes no prompts, such as a ResNet.
    """

    def __init__(self, model: nn.Module) -> None:
        self.vision = VisionModel.of(model)

    @property
    def width(self) -> int:
        """d, the width of prompts."""
        return self.vision.width

    @property
    def depth(self) -> int:
        """How many blocks the tower has."""
        return len(self.vision.blocks)

    def explain(self) -> str:
        """Which path encodes images at this moment, and why."""
        reason = self.vision.why_whole()
        if reason is None:
            return "in parts: of prompts that are replaced only keys and values are computed, once"
        return f"whole: the model's own modules run on whole sequences, since {reason}"

    def __call__(self, pixels: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """Image features [B, D], not normalised, in the dtype the tower computes in.

        pixels: preprocessed images [B, 3, S, S]. prompts: tensors [n, d], or one [l, n, d]: entry 0
        joins the input, entry i replaces the prompts' outputs at the input of block i. After the
        last entry the prompts' outputs stay. None at all gives the model's own features. The class
        token is read, or the mean of the patches where the model pools so; never the prompts.

        Gradients come back in the prompts' dtype. Raises ValueError or TypeError, naming the
        argument, for what does not fit.
        """
        prompts = list(prompts)
        self._check(pixels, prompts)
        vision = self.vision
        pixels = pixels.to(vision.dtype)
        if vision.why_whole() is not None:
            return _encode_whole(vision, pixels, prompts)
        return _encode_in_parts(vision, pixels, prompts)

    def _check(self, pixels: Tensor, prompts: list[Tensor]) -> None:
        if not isinstance(pixels, Tensor):
            raise TypeError(f"pixels: expected a tensor of images, got {type(pixels).__name__}")
        size = (3, *self.vision.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != size or len(pixels) == 0:
            raise ValueError(
                f"pixels: expected [B, {', '.join(map(str, size))}], got {tuple(pixels.shape)}"
            )
        if len(prompts) > self.depth:
            raise ValueError(
                f"prompts: a tower of {self.depth} blocks takes at most {self.depth} entries, "
                f"got {len(prompts)}"
            )
        for layer, vectors in enumerate(prompts):
            if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
                got = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
                raise TypeError(f"prompts: expected floating-point tensors, got {got}")
            if vectors.ndim != 2 or vectors.shape[1] != self.width or len(vectors) == 0:
                raise ValueError(
                    f"prompts: expected entry {layer} of shape [n, {self.width}], "
                    f"got {tuple(vectors.shape)}"
                )
            if vectors.device != self.vision.device:
                raise ValueError(
                    f"prompts: expected tensors on {self.vision.device}, where the model is, "
                    f"got one on {vectors.device}"
                )


def _encode_in_parts(vision: VisionModel, pixels: Tensor, prompts: list[Tensor]) -> Tensor:
    x = vision.embed(pixels)
    prompts = [vectors.to(x.dtype) for vectors in prompts]
    if prompts:
        prompts[0] = vision.visual.ln_pre(prompts[0])
    x = vision.visual.ln_pre(x)
    own, last = x.shape[1], len(vision.blocks) - 1
    for layer in range(last + 1):
        shared = prompts[layer] if layer < len(prompts) else None
        if layer == len(prompts) - 1 and layer < last:
            # Nothing replaces these: from here on they are rows like the patches.
            x = torch.cat([x, shared.expand(len(x), -1, -1)], dim=1)
            shared = None
        read = range(own)[vision.read] if layer == last else None
        rows = slice(None) if read is None else slice(read.start, read.stop)
        x = vision.run_block(layer, x, shared, rows)
    return vision.pool(x)


def _encode_whole(vision: VisionModel, pixels: Tensor, prompts: list[Tensor]) -> Tensor:
    """The model encodes the images as ever, with its own hooks; on the way, hooks of ours put the
    prompts in, and take them away after the last block."""
    visual, blocks = vision.visual, list(vision.blocks)
    if not prompts:
        return vision.encode(pixels)
    if getattr(visual.transformer, "grad_checkpointing", False) and torch.is_grad_enabled():
        raise ValueError(
            "prompts: the image tower checkpoints its blocks, and would run them again in the "
            "backward without the prompts; turn its gradient checkpointing off"
        )
    joined = _Joined(1 if vision.batch_first else 0)
    with ExitStack() as hooks:
        entry = visual.ln_pre.register_forward_pre_hook(joined.at_entry(prompts[0]))
        hooks.enter_context(entry)
        for block, vectors in zip(blocks[1:], prompts[1:], strict=False):
            hooks.enter_context(block.register_forward_pre_hook(joined.replacing(vectors)))
        hooks.enter_context(blocks[-1].register_forward_hook(joined.taken_away))
        features = vision.encode(pixels)
    if joined.count != len(prompts) + 1:
        raise ValueError(
            f"prompts: {type(visual).__name__} does not call ln_pre and its blocks once each, as "
            "modules on tensors, so that prompts can't be put in"
        )
    return features


class _Joined:
    """Hooks that join prompts to the image's own tokens, in the thread that made them alone:
    others may be in the same model. sequence: the axis of tokens in the blocks' inputs."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.own = 0
        self.count = 0
        self.thread = get_ident()

    def at_entry(self, vectors: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if get_ident() != self.thread:
                return None
            self.own = args[0].shape[1]
            return self._join(args[0], vectors, axis=1)

        return hook

    def replacing(self, vectors: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if get_ident() != self.thread:
                return None
            own = args[0].narrow(self.sequence, 0, self.own)
            return (self._join(own, vectors, self.sequence), *args[1:])

        return hook

    def taken_away(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        if get_ident() != self.thread:
            return None
        self.count += 1
        return output.narrow(self.sequence, 0, self.own)

    def _join(self, own: Tensor, vectors: Tensor, axis: int) -> Tensor:
        self.count += 1
        vectors = vectors.to(own.dtype).unsqueeze(1 - axis)
        shape = list(own.shape)
        shape[axis] = vectors.shape[axis]
        return torch.cat([own, vectors.expand(shape)], dim=axis)
