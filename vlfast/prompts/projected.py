"""A student among a teacher's class features: PromptKD (arXiv 2403.02781), section 3.2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.clip.tokens import PromptTokens
from vlfast.errors import VlfastError
from vlfast.prompts.base import Prompts

MOST_LAYERS = 3
OTHER_NAMES_KEPT = 8  # sets of class names whose features are remembered

# Normalised features [C, D_t] of class names, in a dataset's template where that matters.
AskTeacher = Callable[[Sequence[str], str], Tensor]


class ClassTable:
    """A teacher's class features by class name, computed once.

    names: the classes whose features ``fill`` computes and ``features`` holds, fp32 [C, D_t],
    normalised. template: the dataset's, where the teacher's text depends on it, else None. ask:
    computes the features of names; None where there is no teacher any more.
    """

    def __init__(
        self,
        names: Sequence[str],
        template: str | None,
        *,
        width: int,
        ask: AskTeacher | None = None,
        features: Tensor | None = None,
    ) -> None:
        self.names = tuple(names)
        self.template = template
        self.width = width
        self.features = features
        self._ask = ask
        self._rows = {name: row for row, name in reversed(list(enumerate(self.names)))}
        self._others: dict[tuple[tuple[str, ...], str], Tensor] = {}

    def fill(self, template: str) -> Tensor:
        """Compute ``features`` if they are not there. template: the dataset's."""
        if self.features is None:
            self.features = self._asked(self.names, template)
        return self.features

    def of(self, names: tuple[str, ...], template: str) -> Tensor:
        """Features [C, D_t]. Raises VlfastError for names that only the teacher could tell, where
        it is gone."""
        alike = self.template in (None, template)
        if alike and names == self.names:
            return self.fill(template)
        key = (names, template)
        if key not in self._others:
            if alike and self._rows.keys() >= set(names):
                found = self.fill(template)[[self._rows[name] for name in names]]
            else:
                found = self._asked(names, template)
            if len(self._others) == OTHER_NAMES_KEPT:
                del self._others[next(iter(self._others))]
            self._others[key] = found
        return self._others[key]

    def _asked(self, names: tuple[str, ...], template: str) -> Tensor:
        if self._ask is None:
            missing = [name for name in names if name not in self._rows]
            raise VlfastError(
                f"classnames: expected some of the {len(self.names)} that the teacher's features "
                f"are kept of, got {', '.join(map(repr, missing[:3]))}"
            )
        with torch.inference_mode(False):
            return self._ask(names, template)


@dataclass(frozen=True, eq=False)
class NamedClasses:
    """What stands for tokens where class features are looked up."""

    names: tuple[str, ...]
    template: str

    def __len__(self) -> int:
        return len(self.names)

    def check_fits(self, n_ctx: int, context_length: int) -> None:
        """The text tower is not asked, so that every name fits."""


class ProjectedPrompts(Prompts):
    """Other prompts, their image features projected into a teacher's space, and images compared
    with the teacher's class features, or either of the two.

    inner: any prompts. projector: ``make_projector``'s, applied to the features before they are
    normalised ([PKD] trainers/promptkd.py, CustomCLIP), or None.

    layers: of the projector, 1 to 3, or None. classes: the teacher's class features; None keeps the
    inner prompts' own, in whose space the projector then stays. Learnable tensors that image
    features do not depend on are frozen where class features are the teacher's. Raises ValueError
    where widths do not meet, or the inner prompts would have nothing to learn.
    """

    def __init__(
        self,
        clip: ClipModel,
        inner: Prompts,
        *,
        layers: int | None = None,
        classes: ClassTable | None = None,
    ) -> None:
        super().__init__()
        if layers is not None and not 1 <= layers <= MOST_LAYERS:
            raise ValueError(f"prompts.projector: expected 1 to {MOST_LAYERS} layers, got {layers}")
        self.width = clip.width if classes is None else classes.width
        if layers is None and self.width != clip.width:
            raise ValueError(
                f"prompts.projector: the teacher's features have {self.width} numbers and those of "
                f"{clip.name} {clip.width}, so a projector is needed (2 layers in PromptKD)"
            )
        self.inner = inner
        self.classes = classes
        self.projector = None if layers is None else make_projector(clip.width, self.width, layers)
        self.kind = inner.kind
        self.class_bound = inner.class_bound and classes is None
        self.per_image = inner.per_image and classes is None
        self.learns_images = inner.learns_images or layers is not None
        self.encodes_names = classes is None
        self.least_batch = max(inner.least_batch, 2 if (layers or 1) > 1 else 1)
        if classes is not None:
            _freeze_what_images_do_without(clip, inner)

    @property
    def learns_text(self) -> bool:
        return self.classes is None and self.inner.learns_text

    @property
    def reads_pixels(self) -> bool:
        return self.inner.reads_pixels

    @property
    def num_context(self) -> int | None:
        return self.inner.num_context

    def tokenize(
        self, clip: ClipModel, classnames: tuple[str, ...], template: str
    ) -> PromptTokens | NamedClasses:
        if self.classes is not None:
            return NamedClasses(tuple(classnames), template)
        return self.inner.tokenize(clip, classnames, template)

    def encode(
        self,
        clip: ClipModel,
        tokens: PromptTokens | NamedClasses,
        index: Tensor | None = None,
        images: Tensor | None = None,
    ) -> TextOutput:
        if self.classes is None:
            return self.inner.encode(clip, tokens, index, images)
        features = self.classes.of(tokens.names, tokens.template)
        if index is not None:
            features = features[index.to(features.device, non_blocking=True)]
        return TextOutput(features, None)

    def encode_images(
        self, clip: ClipModel, pixels: Tensor | None, frozen: Tensor | None = None
    ) -> Tensor:
        features = self.inner.encode_images(clip, pixels, frozen)
        return features if self.projector is None else self.projector(features)

    def context_vectors(self, images: Tensor | None = None) -> Tensor | None:
        return None if self.classes is not None else self.inner.context_vectors(images)


def make_projector(width: int, out: int, layers: int) -> nn.Sequential:
    """[B, width] to [B, out]: linear layers, batch norm and ReLU between them, with PyTorch's own
    initialisation. [PKD] has two layers, as convolutions of one pixel, which start alike."""
    parts: list[nn.Module] = [nn.Linear(width, out)]
    for _ in range(layers - 1):
        parts += [nn.BatchNorm1d(out), nn.ReLU(), nn.Linear(out, out)]
    return nn.Sequential(*parts)


def _freeze_what_images_do_without(clip: ClipModel, inner: Prompts) -> None:
    """Text prompts learn nothing from a teacher's class features. An image tells which they are."""
    learnable = [p for p in inner.parameters() if p.requires_grad]
    if not learnable:
        return
    reached: Sequence[Tensor | None] = [None] * len(learnable)
    if inner.reads_pixels:
        pixels = torch.zeros(1, 3, clip.image_size, clip.image_size, device=clip.device)
        with torch.enable_grad():
            total = inner.encode_images(clip, pixels).sum()
            reached = torch.autograd.grad(total, learnable, allow_unused=True)
    if all(gradient is None for gradient in reached):
        raise ValueError(
            f"prompts.class_features: with the teacher's, {inner.kind!r} prompts have nothing to "
            "learn, since image features do not depend on them; choose prompts in the image tower, "
            "or hard ones with a projector"
        )
    for parameter, gradient in zip(learnable, reached, strict=True):
        parameter.requires_grad_(gradient is not None)
