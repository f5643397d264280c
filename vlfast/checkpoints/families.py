"""What each method's authors call their learned tensors, and what else their files hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlfast.errors import VlfastError

GATE = "objectives.mixture.gate"  # in our runs; "gate" in MoPD's files

_TEXT_BLOCK = "text_encoder.transformer.resblocks.{}.VPT_shallow"
_IMAGE_BLOCK = "image_encoder.transformer.resblocks.{}.VPT_shallow"
_IMAGE_INPUT = "image_encoder.VPT"
_COMPOUND = "prompt_learner.compound_prompts_text.{}"
_PROJECTOR = "VPT_image_trans.conv1"

# OpenAI's towers, which their files hold as they were.
_BLOCK = (
    r"transformer\.resblocks\.\d+\.(attn\.(in_proj_|out_proj\.)|ln_[12]\.|mlp\.c_(fc|proj)\.)"
    r"(weight|bias)"
)
_TEXT = rf"({_BLOCK}|positional_embedding|text_projection|ln_final\.(weight|bias))"
_VIT = (
    rf"({_BLOCK}|class_embedding|positional_embedding|proj|conv1\.weight"
    r"|ln_(pre|post)\.(weight|bias))"
)
_RESNET = r"((conv|bn)[123]\.\w+|layer[1-4]\.\d+\.[\w.]+|attnpool\.[\w.]+)"
_FROZEN = re.compile(
    r"logit_scale|(prompt_learner\.)?token_(prefix|suffix|midfix)2?"
    rf"|text_encoder\.{_TEXT}"
    rf"|(image_encoder|prompt_learner\.ZS_image_encoder)\.({_VIT}|{_RESNET})"
)


@dataclass(frozen=True)
class Family:
    """Files with the same tensors.

    title: for messages. registered: the name of the folder, which the authors' trainer gives its
    model. recipes: whose prompts these can be, the likeliest first. prefix: of the prompt learner's
    own tensors. known: tells the family by the names of the tensors. options: what the shapes say
    of PromptsConfig. deep: what the context of deeper blocks is called, and the number of the
    first. unused: tensors that the authors' own model never reads.
    """

    title: str
    registered: str
    recipes: tuple[str, ...]
    prefix: str
    known: Callable[[Collection[str]], bool]
    options: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    deep: tuple[str, int] = (_TEXT_BLOCK, 1)
    unused: tuple[str, ...] = ()

    def key(self, name: str) -> str:
        """What the authors call the tensor that our runs call ``name``: [MaPLe] clip/model.py and
        trainers/maple.py, [PromptKD] trainers/promptkd.py, [MoPD] trainers/MoPD.py."""
        path = name.removeprefix("inner.").split(".")
        match path:
            case ["context"]:
                return f"{self.prefix}ctx"
            case ["visual", layer]:
                return _IMAGE_BLOCK.format(layer) if int(layer) else _IMAGE_INPUT
            case ["deep", layer]:
                template, first = self.deep
                return template.format(int(layer) + first)
            case ["projections", "0", part]:
                return f"{self.prefix}proj.{part}"
            case ["projections", layer, part]:
                return f"{self.prefix}compound_prompt_projections.{int(layer) - 1}.{part}"
            case ["projector", *rest]:
                return ".".join([_PROJECTOR, *rest])
        return "gate" if name == GATE else f"{self.prefix}{name}"

    def frozen(self, key: str) -> bool:
        """Whether a tensor is left out: part of the CLIP, or unused."""
        return key in self.unused or _FROZEN.fullmatch(key) is not None


def _context(tensors: Mapping[str, Tensor], key: str) -> dict[str, Any]:
    ctx = tensors[key]
    if ctx.ndim not in (2, 3):
        raise VlfastError(
            f"checkpoint: {key} is {list(ctx.shape)}, expected [n_ctx, d] or [C, n_ctx, d]"
        )
    kind = "shared" if ctx.ndim == 2 else "class_specific"
    return {"kind": kind, "n_ctx": ctx.shape[-2], "init": None}


def _depth(tensors: Mapping[str, Tensor], block: str, first: int) -> int:
    """How many of the tensors ``block`` there are; VlfastError for one missing in between."""
    pattern = re.escape(block).replace(r"\{\}", r"(\d+)")
    layers = {int(found[1]) for key in tensors if (found := re.fullmatch(pattern, key))}
    expected = set(range(first, first + len(layers)))
    if layers != expected:
        missing = block.format(min(expected - layers))
        raise VlfastError(f"checkpoint: there is no tensor {missing}, though deeper ones are there")
    return len(layers)


def _of_images(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    deeper = _depth(tensors, _IMAGE_BLOCK, 1)
    if _IMAGE_INPUT not in tensors:
        if deeper:
            raise VlfastError(
                f"checkpoint: there is no tensor {_IMAGE_INPUT}, though deeper ones are there"
            )
        return {"n_visual": None, "visual_depth": None}
    if tensors[_IMAGE_INPUT].ndim != 2:
        raise VlfastError(
            f"checkpoint: {_IMAGE_INPUT} is {list(tensors[_IMAGE_INPUT].shape)}, expected "
            "[n_visual, width]"
        )
    return {"n_visual": tensors[_IMAGE_INPUT].shape[0], "visual_depth": 1 + deeper}


def _visual_options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"kind": "visual", "n_ctx": None, "init": None, **_of_images(tensors)}


def _independent_options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    text = {**_context(tensors, "prompt_learner.ctx"), "kind": "independent"}
    return {**text, "depth": 1 + _depth(tensors, _TEXT_BLOCK, 1), **_of_images(tensors)}


def _coupled_options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    depth = 1 + _depth(tensors, _COMPOUND, 0)
    return {**_context(tensors, "prompt_learner.ctx"), "kind": "coupled", "depth": depth}


def _conditional_options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**_context(tensors, "ctx"), "kind": "conditional"}


def _context_options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return _context(tensors, "ctx")


def _promptkd_options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**_visual_options(tensors), "projector": 2, "class_features": "teacher"}


def _starts(keys: Collection[str], start: str) -> bool:
    return any(key.startswith(start) for key in keys)


_KDPL = ("kdpl", "kdpl-ca")

# The first that knows a file's tensors has it.
FAMILIES: tuple[Family, ...] = (
    Family(
        title="PromptKD",
        registered="VLPromptLearner",
        recipes=("promptkd",),
        prefix="",
        known=lambda keys: _starts(keys, f"{_PROJECTOR}."),
        options=_promptkd_options,
    ),
    Family(
        title="MaPLe",
        registered="MultiModalPromptLearner",
        recipes=("maple", *_KDPL),
        prefix="prompt_learner.",
        known=lambda keys: "prompt_learner.proj.weight" in keys,
        options=_coupled_options,
        deep=(_COMPOUND, 0),
    ),
    Family(
        title="PromptSRC",
        registered="VLPromptLearner",
        recipes=("promptsrc", "ivlp", *_KDPL),
        prefix="prompt_learner.",
        known=lambda keys: (
            "prompt_learner.ctx" in keys and _starts(keys, "prompt_learner.ZS_image_encoder.")
        ),
        options=_independent_options,
    ),
    Family(
        title="IVLP",
        registered="VLPromptLearner",
        recipes=("ivlp", "promptsrc", *_KDPL),
        prefix="prompt_learner.",
        known=lambda keys: "prompt_learner.ctx" in keys,
        options=_independent_options,
    ),
    Family(
        title="VPT",
        registered="prompt_learner",
        recipes=("vpt", *_KDPL),
        prefix="",
        known=lambda keys: _IMAGE_INPUT in keys,
        options=_visual_options,
    ),
    Family(
        title="MoPD",
        registered="prompt_learner",
        recipes=("mopd",),
        prefix="",
        known=lambda keys: {"ctx", "gate"} <= set(keys),
        options=_context_options,
    ),
    Family(
        title="CoCoOp",
        registered="prompt_learner",
        recipes=("cocoop", *_KDPL),
        prefix="",
        known=lambda keys: {"ctx", "meta_net.linear2.weight"} <= set(keys),
        options=_conditional_options,
    ),
    Family(
        title="KgCoOp",
        registered="prompt_learner",
        recipes=("kgcoop",),
        prefix="",
        known=lambda keys: {"ctx", "bias_vectors"} <= set(keys),
        options=_context_options,
        unused=("bias_vectors", "meta_net.linear1.weight", "meta_net.linear1.bias"),
    ),
    Family(
        title="CoOp",
        registered="prompt_learner",
        recipes=("coop", "kgcoop", "prograd", "plpp", "mopd", "sipd", *_KDPL),
        prefix="",
        known=lambda keys: "ctx" in keys,
        options=_context_options,
    ),
)


def family_of(tensors: Mapping[str, Tensor], what: str) -> Family:
    """Whose file holds these tensors. VlfastError naming some of them where it is nobody's."""
    for family in FAMILIES:
        if family.known(tensors):
            return family
    names = ", ".join(list(tensors)[:5])
    raise VlfastError(
        f"{what} holds the prompts of no method that is known here (CoOp, CoCoOp, KgCoOp, ProGrad, "
        f"VPT, IVLP, MaPLe, PromptSRC, KDPL, MoPD, PromptKD); its tensors are {names}"
        f"{', ...' * (len(tensors) > 5)}"
    )
