"""A CLIP with prompts as a classifier over class names."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from vlfast.clip.feature_cache import FeatureCache
from vlfast.clip.models import ClipModel
from vlfast.clip.text_tower import TextOutput
from vlfast.clip.words import check_vocabulary
from vlfast.data.dataset import Split
from vlfast.data.views import ViewConfig, Views, worker_errors
from vlfast.prompts import Prompts

TEST_BATCH = 100  # Dassl's test batch
OTHER_NAMES_KEPT = 8  # sets of class names whose features are remembered


def view_config(clip: ClipModel) -> ViewConfig:
    """What this model expects of images."""
    return ViewConfig(clip.image_size, clip.mean, clip.std, clip.interpolation)


class PromptedClassifier:
    """Class names, prompts and a frozen CLIP. ``template`` holds one ``{}`` for the class name."""

    def __init__(
        self, clip: ClipModel, prompts: Prompts, classnames: Sequence[str], template: str
    ) -> None:
        if isinstance(classnames, str):
            raise TypeError(f"classnames: expected a sequence of names, got {classnames!r}")
        self.clip = clip
        self.prompts = prompts
        self.classnames = tuple(classnames)
        self.template = template
        check_vocabulary(clip, self.classnames, "classnames")
        self.tokens = prompts.tokenize(clip, self.classnames, template)
        self._features = FeatureCache()
        self._with_other_names: dict[tuple[str, ...], PromptedClassifier] = {}

    def for_classes(self, classnames: Sequence[str]) -> PromptedClassifier:
        """The same prompts with other class names. ValueError for prompts bound to their own."""
        if self.prompts.class_bound and tuple(classnames) != self.classnames:
            raise ValueError(
                f"classnames: {self.prompts.kind} prompts know only the {len(self.classnames)} "
                f"classes they were learned for, got {', '.join(map(repr, classnames[:3]))}, ..."
            )
        names = tuple(classnames)
        if names == self.classnames:
            return self
        if names not in self._with_other_names:
            if len(self._with_other_names) == OTHER_NAMES_KEPT:
                del self._with_other_names[next(iter(self._with_other_names))]
            other = PromptedClassifier(self.clip, self.prompts, classnames, self.template)
            self._with_other_names[names] = other
        return self._with_other_names[names]

    def encode_text(self) -> TextOutput:
        """Class features and context states, differentiable to the prompts."""
        return self.prompts.encode(self.clip, self.tokens)

    def class_features(self) -> Tensor:
        """Class features for evaluation, [C, D] without autograd: computed again only where the
        prompts or the model have changed."""
        modules = [*self.prompts.modules(), *self.clip.text_tower.text.modules()]
        learned = self.prompts.state_dict().values()
        return self._features.get(modules, lambda: self.encode_text().features, learned)

    def logits(self, images: Tensor, class_features: Tensor) -> Tensor:
        """Logit scale times cosine, fp32 [B, C], from normalised image features [B, D] and class
        features [C, D]. Under autocast too: half precision has steps of 0.06 at such scales."""
        with torch.autocast(images.device.type, enabled=False):
            classes = functional.normalize(class_features.float(), dim=-1)
            return self.clip.logit_scale.float() * images.float() @ classes.T

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Logits [N, C] of normalised image features [N, D]."""
        return self.logits(images, self.class_features())


def loader_workers(split: Split, asked: int | None) -> int:
    """Processes that load images. Views that are rendered in memory need none; files get as many
    as there are cores, at most 8."""
    if asked is not None:
        return asked
    return 0 if split.source.renders_views else min(8, os.cpu_count() or 1)


@torch.no_grad()
def encode_split(
    clip: ClipModel, split: Split, *, workers: int | None = None
) -> tuple[Tensor, Tensor]:
    """Normalised features [N, D] of a split's test views and labels [N], on the model's device.
    The split has at least one image."""
    loader = DataLoader(
        Views(split, view_config(clip)),
        batch_size=TEST_BATCH,
        num_workers=loader_workers(split, workers),
    )
    with worker_errors():
        features = [clip.encode_images(images.to(clip.device)) for images, _ in loader]
    return torch.cat(features), torch.from_numpy(split.labels).to(clip.device)
