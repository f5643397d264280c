"""Existing codebases' steps before and after ``accelerate``, on look-alikes of ViT-B/32's size.

The look-alikes are those of the tests. What the public repositories themselves take is measured by
benchmarks/dropin_repositories.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from benchmarks.contest import MODES, OURS, TRAINING_STEP, Case, Problem, outputs
from benchmarks.padded import class_names
from tests.dropin.lookalike_clip import VIT_B32, Sizes
from tests.dropin.lookalikes import Built, build
from vlfast.dropin import accelerate

THEIRS = "the codebase's"
# The text tower of ViT-L/14, PromptKD's teacher, beside an image tower that is not asked.
L14_TEXT = Sizes(768, 12, 12, 768, 64, 1, 1, 32, 32, 77, 49408)

# Of (model, images, labels), or of the images that its code takes one by one.
Loss = Callable[[Built], Tensor | Iterator[Tensor]]


def make(
    family: str,
    classes: int,
    device: str,
    *,
    images: int,
    of: Loss,
    sizes: Sizes = VIT_B32,
    **options: Any,
) -> Problem:
    """Two models of the same weights, one of them accelerated, that share what they learn."""
    tokenizer = SimpleTokenizer()
    names = [tokenizer.encode(name) for name in class_names(classes)]

    def built(dtype: torch.dtype = torch.float32) -> Built:
        made = build(
            family,
            classes=names,
            sizes=sizes,
            images=images,
            dtype=dtype,
            rounded_backward=False,
            **options,
        )
        for model in {made.model, made.target}:
            model.to(device)
        made.images, made.labels = made.images.to(device), made.labels.to(device)
        made.train()
        return made

    theirs, ours = built(), built()
    share(theirs.model, ours.model)
    accelerate(ours.target)
    leaves = list(theirs.learnable().values()) if theirs.model is theirs.target else []

    def exact() -> list[Tensor]:
        precise = built(torch.float64)
        precise.images = precise.images.double()
        end_at_eot(precise.target)
        its_leaves = list(precise.learnable().values()) if leaves else []
        problem = Problem({THEIRS: partial(of, precise)}, its_leaves, exact=list)
        return outputs(problem, THEIRS, MODES[bool(leaves)])

    def terms() -> Iterator[Tensor]:
        yield from of(theirs)

    # Ours holds the graphs of all images at once.
    sides = {OURS: partial(whole_step if of is one_by_one else of, ours)}
    sides[THEIRS] = terms if of is one_by_one else partial(of, theirs)

    return Problem(
        sides=sides,
        leaves=leaves,
        exact=exact,
        optimizer=torch.optim.SGD(leaves, lr=0.002, momentum=0.9) if leaves else None,
        tolerance=1e-3,
    )


def share(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` have the very parameters that ``source`` learns."""
    for name, parameter in source.named_parameters():
        if parameter.requires_grad:
            owner, _, own_name = name.rpartition(".")
            target.get_submodule(owner)._parameters[own_name] = parameter


def end_at_eot(model: nn.Module) -> None:
    """Let its text encoder see nothing behind the last EOT, where no causal attention looks: else
    most of the time of a contest would go into 77 tokens in fp64."""
    encoder = model.text_encoder
    length = int(model.tokenized_prompts.argmax(dim=-1).max()) + 1
    places = encoder.positional_embedding[:length].detach()
    encoder.positional_embedding = nn.Parameter(places, requires_grad=False)
    for block in encoder.transformer.resblocks:
        block.attn_mask = block.attn_mask[:length, :length]
    whole = type(encoder).forward

    def forward(prompts: Tensor, tokens: Tensor, *deep: Any) -> Tensor:
        return whole(encoder, prompts[:, :length], tokens[:, :length], *deep)

    encoder.forward = forward


def whole_step(built: Built) -> Tensor:
    _, losses = built.compute(built.images, built.labels)
    return losses[0]


def one_by_one(built: Built) -> Iterator[Tensor]:
    """The mean over the images, whose graphs go back at once: 8 of them take some 17 GB."""
    for image, label in zip(built.images.split(1), built.labels.split(1), strict=True):
        _, losses = built.compute(image, label)
        yield losses[0] / len(built.images)


def class_features(built: Built) -> Tensor:
    """The text encoder alone, with any loss of its features."""
    model = built.target
    prompts = model.prompt_learner()
    features = model.text_encoder(prompts, model.tokenized_prompts)
    upstream = torch.linspace(-1, 1, features.numel(), dtype=torch.float64).sin()
    return (features * upstream.view_as(features).to(features)).sum()


def case(name: str, family: str, classes: int, *, full: bool = False, **options: Any) -> Case:
    images = options.setdefault("images", 1)
    of = options.setdefault("of", whole_step)
    modes = (TRAINING_STEP,)
    if of is class_features:
        modes = ("forward",) if family == "promptkd" else ("forward+backward",)
        name += ", class features"
    else:
        name += f", {images} image{'s' * (images > 1)}"
    return Case(
        f"{name}, {classes} classes",
        partial(make, family, classes, **options),
        full,
        modes=modes,
        baselines=(THEIRS,),
        slow=True,
        seconds=60.0 if full else 20.0,
    )


SMALL_IMAGES = replace(VIT_B32, vision_layers=1)

CASES = [
    case("CoOp", "coop", 100, of=class_features, sizes=SMALL_IMAGES, n_ctx=16),
    case("CoOp", "coop", 400, of=class_features, sizes=SMALL_IMAGES, n_ctx=16, full=True),
    case("CoOp", "coop", 100, images=32, n_ctx=16),
    case("CoOp", "coop", 400, images=32, n_ctx=16, full=True),
    case("CoCoOp", "cocoop", 100),
    case("CoCoOp", "cocoop", 100, images=8, of=one_by_one, full=True),
    case("MaPLe", "maple", 100, images=4, depth=9),
    case("IVLP", "ivlp", 100, images=4, depth=12),
    case("PromptKD's teacher", "promptkd", 100, of=class_features, sizes=L14_TEXT, depth=9),
]


@pytest.mark.parametrize("mode", [TRAINING_STEP, "forward+backward", "forward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dropin(contest, case, mode):
    contest(case, mode)
