"""Small tasks, prompts that stand for every kind, and a CLIP in plain PyTorch to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from vlfast.objectives import Batch, Task, build_objectives
from vlfast.prompts import Prompts, build_prompts
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.fit import TrainingStep

NAMES = ("cat", "yellow school bus", "hen", "red fox")
LABELS = torch.tensor([0, 3, 1, 2, 0])
DIM = 32
KINDS = ("shared", "class_specific", "per_image", "images")


class PerImage(Prompts):
    """A context that a linear layer of the image's features moves, as CoCoOp's does."""

    kind = "per_image"
    per_image = True

    def __init__(self):
        super().__init__()
        self.context = nn.Parameter(torch.randn(3, DIM) * 0.02)
        self.move = nn.Linear(DIM, DIM)

    def encode(self, clip, tokens, index=None, images=None):
        context = self.context + self.move(images)[:, None]
        return clip.text_tower(context, tokens, per="image", index=index)

    def context_vectors(self, images=None):
        return self.context if images is None else self.context + self.move(images)[:, None]


class InImages(Prompts):
    """A context, and image features that a matrix turns."""

    kind = "images"
    learns_images = True

    def __init__(self):
        super().__init__()
        self.context = nn.Parameter(torch.randn(3, DIM) * 0.02)
        self.turn = nn.Parameter(torch.eye(DIM) + 0.1 * torch.randn(DIM, DIM))

    def encode(self, clip, tokens, index=None, images=None):
        return clip.text_tower(self.context, tokens, index=index)

    def encode_images(self, clip, pixels, frozen=None):
        return frozen @ self.turn

    def context_vectors(self, images=None):
        return self.context


class OnlyImages(InImages):
    """Class features of the template."""

    kind = "only_images"

    def tokenize(self, clip, classnames, template):
        return clip.text_tower.tokenize(classnames, template.format("{name}"))

    def encode(self, clip, tokens, index=None, images=None):
        return clip.text_tower(None, tokens, index=index)

    def context_vectors(self, images=None):
        return None


class FixedTeacher:
    """A teacher whose features are random, the same for the same name."""

    def __init__(self, width=24, scale=30.0, calibration=1.0):
        self.width = width
        self.calibration = calibration
        self.logit_scale = torch.tensor(scale / calibration)
        self.asked = []

    def encode_images(self, pixels):
        raise AssertionError("the batch has them")

    def class_features(self, classnames, template=None):
        self.asked.append((tuple(classnames), template))
        rows = [
            torch.randn(self.width, generator=torch.Generator().manual_seed(sum(map(ord, name))))
            for name in classnames
        ]
        return functional.normalize(torch.stack(rows), dim=1)


def make_task(clip, kind="shared", names=NAMES, teacher=None, dataset="letters", **options):
    torch.manual_seed(0)
    toys = {toy.kind: toy for toy in (PerImage, InImages, OnlyImages)}
    if kind in toys:
        prompts = toys[kind]()
    else:
        prompts = build_prompts(kind, clip, num_classes=len(names), n_ctx=3)
    classifier = PromptedClassifier(clip, prompts, names, "a photo of a {}.")
    return Task(classifier, dataset, teacher=teacher, **options)


def make_batch(step=0, width=24) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    frozen = torch.randn(len(LABELS), DIM, generator=generator)
    teacher = torch.randn(len(LABELS), width, generator=generator)
    return Batch(LABELS, frozen=3 * frozen, teacher=functional.normalize(teacher, dim=1))


class Plain:
    """The model in fp64, whole sequences one by one, no class of ours."""

    def __init__(self, clip):
        self.model = copy.deepcopy(clip.model).double()
        self.tokenizer = clip.tokenizer
        self.scale = self.model.logit_scale.exp()

    def encode(self, text, context=None):
        """The feature of a text behind a context, not normalised."""
        ids = [*self.tokenizer.encode(text), self.tokenizer.eot_token_id]
        embed = self.model.token_embedding
        start, rest = embed(torch.tensor([self.tokenizer.sot_token_id])), embed(torch.tensor(ids))
        x = torch.cat([start, *([] if context is None else [context]), rest])
        x = (x + self.model.positional_embedding[: len(x)])[None]
        mask = torch.full((x.shape[1],) * 2, float("-inf"), dtype=x.dtype).triu(1)
        for block in self.model.transformer.resblocks:
            x = block(x, attn_mask=mask)
        return self.model.ln_final(x)[0, -1] @ self.model.text_projection

    def hard(self, names, template):
        return torch.stack([self.encode(template.format(name)) for name in names])

    def classes(self, prompts, names, images):
        """Normalised class features [C, D] or [B, C, D] of fp64 prompts."""
        if prompts.kind == "only_images":
            return unit(self.hard(names, "a photo of a {}."))
        context = prompts.context
        if prompts.kind == "per_image":
            moved = context + prompts.move(images)[:, None]
            return unit(
                torch.stack([torch.stack([self.encode(f"{n}.", c) for n in names]) for c in moved])
            )
        of_class = context if context.ndim == 3 else [context] * len(names)
        rows = [self.encode(f"{name}.", c) for name, c in zip(names, of_class, strict=True)]
        return unit(torch.stack(rows))

    def images(self, prompts, batch):
        frozen = batch.frozen.double()
        return unit(frozen @ prompts.turn if prompts.learns_images else frozen)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def kl(p_logits, q_logits):
    """[B], KL(p || q)."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# From the plain model, fp64 prompts, their normalised image features and class features, their
# logits and the batch, to the loss. The last argument holds the objective's own tensors.
PlainLoss = Callable[..., torch.Tensor]


def compare_training(task, specs, plain_loss: PlainLoss, *, steps=3, own=(), rtol=2e-4):
    """A few steps of SGD: losses and the gradient of every learnable tensor against ``plain_loss``.

    own: names of tensors that the one objective learns.
    """
    objectives = build_objectives(specs)
    for objective in objectives:
        objective.check(task)
        objective.prepare(task)
    training = TrainingStep(task, objectives)
    plain = Plain(task.clip)
    prompts = copy.deepcopy(task.prompts).double()
    mine = {n: getattr(objectives[0], n).detach().double().requires_grad_() for n in own}
    theirs = [*prompts.parameters(), *mine.values()]
    ours = list(training.parameters())
    assert len(ours) == len(theirs)
    optimizers = [torch.optim.SGD(ps, lr=0.5, momentum=0.9) for ps in (ours, theirs)]
    for number in range(steps):
        batch = make_batch(number)
        loss, _ = training(batch)
        images = plain.images(prompts, batch)
        classes = plain.classes(prompts, task.classifier.classnames, images)
        logits = plain.scale * (images[:, None] * classes).sum(-1)
        expected = plain_loss(plain, prompts, images, classes, logits, batch, **mine)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        for optimizer, value in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            value.backward()
        for ours_one, theirs_one in zip(ours, theirs, strict=True):
            assert theirs_one.grad is not None
            scale = float(theirs_one.grad.abs().max())
            torch.testing.assert_close(
                ours_one.grad.double(), theirs_one.grad, rtol=rtol, atol=rtol * scale + 1e-9
            )
        for optimizer in optimizers:
            optimizer.step()
    return training


def losses_of(task, specs, steps=2):
    """A few losses, for comparing backends."""
    objectives = build_objectives(specs)
    for objective in objectives:
        objective.prepare(task)
    training = TrainingStep(task, objectives)
    optimizer = torch.optim.SGD(training.parameters(), lr=0.5)
    losses = []
    for number in range(steps):
        loss, _ = training(make_batch(number))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
