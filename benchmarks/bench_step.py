"""Whole training steps of CoOp and CoCoOp, ViT-B/32: images in, learned vectors updated."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import TRAINING_STEP, Case, Problem
from benchmarks.padded import (
    CUT,
    MOST_ON_A_CPU,
    PADDED,
    Loss,
    PaddedTower,
    build_clip,
    class_names,
    three_sides,
)
from vlfast.clip.text_tower import TextTower
from vlfast.clip.tokens import PromptTokens

MOST_LOOPED = 800  # images x classes at 77 tokens: more take minutes a step on a CPU


def make_coop(
    classes: int,
    device: str,
    *,
    images: int = 32,
    n_ctx: int = 16,
    config: Mapping[str, Any] | None = None,
) -> Problem:
    """CoOp: one context for all images."""
    model, names = build_clip(config, device), class_names(classes)
    tower, tokens, context = our_tower(model, names, n_ctx)
    batch, labels = random_images(model, images, classes)

    def ours() -> Tensor:
        image_features = encode_images(model, batch)
        return cross_entropy(model, image_features, tower(context, tokens).features, labels)

    def padded(cut: bool) -> Loss:
        its_tower = PaddedTower(model, names, n_ctx, cut=cut)

        def theirs() -> Tensor:
            image_features = encode_images(model, batch)
            return cross_entropy(model, image_features, its_tower(context), labels)

        return theirs

    def exact() -> list[Tensor]:
        precise = copy.deepcopy(model).double()
        leaf = context.detach().double().requires_grad_()
        features = PaddedTower(precise, names, n_ctx, cut=True).in_parts(leaf)
        loss = cross_entropy(precise, encode_images(precise, batch.double()), features, labels)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    return Problem(
        sides=three_sides(ours, padded, device != "cpu" or classes <= MOST_ON_A_CPU),
        leaves=[context],
        exact=exact,
        optimizer=sgd([context]),
        tolerance=1e-4,
    )


def make_cocoop(
    images: int,
    classes: int,
    device: str,
    *,
    n_ctx: int = 4,
    config: Mapping[str, Any] | None = None,
) -> Problem:
    """CoCoOp: the context of an image is shifted by what a small network makes of its features."""
    model, names = build_clip(config, device), class_names(classes)
    tower, tokens, context = our_tower(model, names, n_ctx)
    batch, labels = random_images(model, images, classes)
    joint = model.text_projection.shape[1]
    meta_net = nn.Sequential(
        nn.Linear(joint, joint // 16), nn.ReLU(), nn.Linear(joint // 16, tower.width)
    ).to(device)
    leaves = [context, *meta_net.parameters()]

    def ours() -> Tensor:
        image_features = encode_images(model, batch)
        contexts = context + meta_net(image_features).unsqueeze(1)
        text_features = tower(contexts, tokens, per="image").features
        return cross_entropy(model, image_features, text_features, labels)

    def padded(cut: bool) -> Loss:
        its_tower = PaddedTower(model, names, n_ctx, cut=cut)

        def image_by_image() -> Iterator[Tensor]:
            """Their loop over the images. Each goes back at once: 8 graphs take some 17 GB."""
            image_features = encode_images(model, batch)
            for image_feature, label in zip(image_features, labels, strict=True):
                text_features = its_tower(context + meta_net(image_feature))
                loss = cross_entropy(model, image_feature[None], text_features, label[None])
                yield loss / images

        return image_by_image

    def exact() -> list[Tensor]:
        precise, its_net = copy.deepcopy(model).double(), copy.deepcopy(meta_net).double()
        leaf = context.detach().double().requires_grad_()
        its_tower = PaddedTower(precise, names, n_ctx, cut=True)
        image_features = encode_images(precise, batch.double())
        contexts = leaf + its_net(image_features).unsqueeze(1)
        features = torch.stack([its_tower.in_parts(one) for one in contexts])
        loss = cross_entropy(precise, image_features, features, labels)
        return [loss.detach(), *torch.autograd.grad(loss, [leaf, *its_net.parameters()])]

    return Problem(
        sides=three_sides(ours, padded, device != "cpu" or images * classes <= MOST_LOOPED),
        leaves=leaves,
        exact=exact,
        optimizer=sgd(leaves),
        tolerance=1e-4,
    )


def our_tower(
    model: open_clip.CLIP, names: list[str], n_ctx: int
) -> tuple[TextTower, PromptTokens, Tensor]:
    """With the class names laid out, and a context to learn."""
    tower = TextTower(model)
    context = 0.02 * torch.randn(n_ctx, tower.width)
    return tower, tower.tokenize(names), context.to(model.logit_scale.device).requires_grad_()


def random_images(model: open_clip.CLIP, images: int, classes: int) -> tuple[Tensor, Tensor]:
    device = model.logit_scale.device
    batch = torch.randn(images, 3, *model.visual.image_size)
    return batch.to(device), torch.randint(classes, (images,)).to(device)


@torch.no_grad()
def encode_images(model: open_clip.CLIP, images: Tensor) -> Tensor:
    """The image tower is frozen, and nothing that learns stands before it."""
    return model.encode_image(images, normalize=True)


def cross_entropy(
    model: open_clip.CLIP, image_features: Tensor, text_features: Tensor, labels: Tensor
) -> Tensor:
    """text_features: [C, D], or [B, C, D] where each image has its own."""
    cosines = image_features.unsqueeze(1) @ F.normalize(text_features, dim=-1).mT
    return F.cross_entropy(model.logit_scale.exp() * cosines.squeeze(1), labels)


def sgd(leaves: list[Tensor]) -> torch.optim.SGD:
    return torch.optim.SGD(leaves, lr=0.002, momentum=0.9, weight_decay=5e-4)


def coop(classes: int, *, full: bool = False) -> Case:
    name = f"CoOp, 32 images, {classes} classes"
    return step_case(name, partial(make_coop, classes), full)


def cocoop(images: int, classes: int, *, full: bool = False) -> Case:
    name = f"CoCoOp, {images} image{'s' * (images > 1)}, {classes} classes"
    return step_case(name, partial(make_cocoop, images, classes), full)


def step_case(name: str, make: Any, full: bool) -> Case:
    return Case(
        name,
        make,
        full,
        modes=(TRAINING_STEP,),
        baselines=(PADDED, CUT),
        slow=True,
        seconds=60.0 if full else 20.0,
    )


CASES = [
    coop(50),
    coop(100),
    coop(400, full=True),
    coop(1000, full=True),
    cocoop(1, 50),
    cocoop(1, 100),
    cocoop(1, 400, full=True),
    cocoop(1, 1000, full=True),
    cocoop(8, 50, full=True),
    cocoop(8, 100, full=True),
    cocoop(8, 400, full=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(contest, case):
    contest(case, TRAINING_STEP)
