"""An ensemble of hard prompts: the mean of their class features (zero-shot CLIP)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.clip.tokens import PromptTokens
from vlfast.data.templates import check_template
from vlfast.errors import VlfastError
from vlfast.prompts.base import Prompts

OWN = "own"

# The seven of OpenAI's eighty ImageNet templates that CoOp chooses for it ([CoOp]
# trainers/imagenet_templates.py, IMAGENET_TEMPLATES_SELECT).
SELECTED = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


class EnsembleTokens(tuple[PromptTokens, ...]):
    """The class names in each template."""

    def check_fits(self, n_ctx: int, context_length: int) -> None:
        for tokens in self:
            tokens.check_fits(n_ctx, context_length)


class EnsemblePrompt(Prompts):
    """Class features that are the mean, over templates, of the normalised features of hard prompts,
    as ZeroshotCLIP2 of [CoOp] trainers/zsclip.py has them.

    templates: each with one ``{}`` for the class name; "own" stands for the dataset's template.
    """

    kind = "ensemble"

    def __init__(self, templates: Sequence[str] = (*SELECTED, OWN)) -> None:
        super().__init__()
        if not templates:
            raise VlfastError("prompts.templates: expected at least one, got none")
        for template in templates:
            if template != OWN:
                check_template(template, "prompts.templates")
        self.templates = tuple(templates)

    def tokenize(
        self, clip: ClipModel, classnames: tuple[str, ...], template: str
    ) -> EnsembleTokens:
        texts = [template if text == OWN else text for text in self.templates]
        return EnsembleTokens(
            clip.text_tower.tokenize(classnames, text.format("{name}")) for text in texts
        )

    @torch.no_grad()
    def encode(
        self,
        clip: ClipModel,
        tokens: EnsembleTokens,
        index: Tensor | None = None,
        images: Tensor | None = None,
    ) -> TextOutput:
        features = [clip.text_tower(None, each, index=index).features.float() for each in tokens]
        normalised = functional.normalize(torch.stack(features), dim=-1)
        return TextOutput(normalised.mean(dim=0), None)
