"""Whole training steps of CoOp, CoCoOp and PromptKD, ViT-B/32: images in, learned vectors updated.

With stored features the frozen models' part of a step is read instead of computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import OURS, TRAINING_STEP, Case, Problem
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
from vlfast.clip.vision_tower import VisionTower
from vlfast.ops import symmetric_kl_loss
from vlfast.prompts.projected import make_projector

# Image features of pixels, with tokens in the image tower.
Encode = Callable[[Tensor, list[Tensor]], Tensor]

MOST_LOOPED = 800  # images x classes at 77 tokens: more take minutes a step on a CPU


def make_coop(
    classes: int,
    device: str,
    *,
    images: int = 32,
    n_ctx: int = 16,
    stored: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Problem:
    """CoOp: one context for all images. stored: ours reads the image features."""
    model, names = build_clip(config, device), class_names(classes)
    tower, tokens, context = our_tower(model, names, n_ctx)
    batch, labels = random_images(model, images, classes)
    read = encode_images(model, batch) if stored else None

    def ours() -> Tensor:
        image_features = read if stored else encode_images(model, batch)
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


def make_promptkd(
    classes: int,
    device: str,
    *,
    images: int = 8,
    n_visual: int = 4,
    depth: int = 9,
    config: Mapping[str, Any] | None = None,
    teacher_config: Mapping[str, Any] | None = None,
) -> Problem:
    """PromptKD: tokens in the image tower and a projector learn from a teacher, ViT-L/14.

    Ours reads the teacher's features; their code computes its class features and its image features
    in each step. The teacher's own tokens, which cost little, are left out.
    """
    model, names = build_clip(config, device), class_names(classes)
    teacher = build_clip(teacher_config or open_clip.get_model_config("ViT-L-14"), device)
    batch, _ = random_images(model, images, classes)
    context = 0.02 * torch.randn(n_visual, teacher.transformer.width, device=device)
    width = model.visual.conv1.out_channels
    prompts = [0.02 * torch.randn(n_visual, width, device=device) for _ in range(depth)]
    leaves = [prompt.requires_grad_() for prompt in prompts]
    out = teacher.text_projection.shape[1]
    projector = make_projector(model.text_projection.shape[1], out, 2).to(device)
    # Batch norm takes the first layer's bias away: its gradient is 0 but for rounding.
    projector[0].bias.requires_grad_(False)
    leaves += learnable(projector)
    size = teacher.visual.image_size

    def of_teacher(its_tower: PaddedTower, pixels: Tensor) -> tuple[Tensor, Tensor]:
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        with torch.no_grad():
            return encode_images(its_tower.model, pixels), F.normalize(its_tower(context), dim=-1)

    tower = VisionTower(model)

    def of_student(encode: Encode, classes: Tensor) -> Tensor:
        return F.normalize(projector(encode(batch, prompts)), dim=-1) @ classes.T

    scale = model.logit_scale.exp().detach()
    its_scale = teacher.logit_scale.exp().detach()
    read, read_classes = of_teacher(PaddedTower(teacher, names, n_visual), batch)

    def ours() -> Tensor:
        return symmetric_kl_loss(
            of_student(tower, read_classes),
            read @ read_classes.T,
            student_scale=scale,
            teacher_scale=its_scale,
            forward_weight=1.0,
            reverse_weight=0.0,
            reduction="mean",
        )

    def padded(cut: bool) -> Loss:
        its_tower = PaddedTower(teacher, names, n_visual, cut=cut)

        def theirs() -> Tensor:
            its_images, its_classes = of_teacher(its_tower, batch)
            plain = partial(prompted_images, model.visual)
            log_p = F.log_softmax(scale * of_student(plain, its_classes), dim=-1)
            q = F.softmax(its_scale * its_images @ its_classes.T, dim=-1)
            return F.kl_div(log_p, q, reduction="sum") / q.numel()

        return theirs

    def exact() -> list[Tensor]:
        visual, its_projector = copy.deepcopy(model.visual).double(), copy.deepcopy(projector)
        its_projector.double()
        its_prompts = [prompt.detach().double().requires_grad_() for prompt in prompts]
        its_classes, its_images = read_classes.double(), read.double()
        features = its_projector(prompted_images(visual, batch.double(), its_prompts))
        log_p = F.log_softmax(scale * F.normalize(features, dim=-1) @ its_classes.T, dim=-1)
        q = F.softmax(its_scale * its_images @ its_classes.T, dim=-1)
        loss = F.kl_div(log_p, q, reduction="sum") / q.numel()
        its_leaves = [*its_prompts, *learnable(its_projector)]
        return [loss.detach(), *torch.autograd.grad(loss, its_leaves)]

    return Problem(
        sides={OURS: ours, PADDED: padded(False), CUT: padded(True)},
        leaves=leaves,
        exact=exact,
        optimizer=torch.optim.SGD(leaves, lr=0.005, momentum=0.9, weight_decay=5e-4),
        tolerance=1e-3,
    )


def prompted_images(visual: nn.Module, pixels: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Features [B, D] of a ViT whose first blocks have tokens of their own behind the patches'."""
    x = visual.conv1(pixels).flatten(2).mT
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = x + visual.positional_embedding
    length = x.shape[1]
    first, *deeper = (prompt.expand(len(x), -1, -1) for prompt in prompts)
    x = visual.ln_pre(torch.cat([x, first], dim=1))
    for layer, block in enumerate(visual.transformer.resblocks):
        if 0 < layer <= len(deeper):
            x = torch.cat([x[:, :length], deeper[layer - 1]], dim=1)
        x = block(x)
    return visual.ln_post(x[:, 0]) @ visual.proj


def learnable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


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


def coop(classes: int, *, stored: bool = False, full: bool = False) -> Case:
    name = f"CoOp, 32 {'stored ' * stored}images, {classes} classes"
    return step_case(name, partial(make_coop, classes, stored=stored), full)


def promptkd(classes: int, *, full: bool = False) -> Case:
    name = f"PromptKD, 8 images, stored teacher, {classes} classes"
    return step_case(name, partial(make_promptkd, classes), full)


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
