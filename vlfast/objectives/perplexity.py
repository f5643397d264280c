"""PLPP: the perplexity of the context under a language model (arXiv 2412.15277)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlfast.clip.models import ClipModel
from vlfast.errors import VlfastError
from vlfast.objectives.base import Objective, Step, Task
from vlfast.ops import plpp_terms


class Perplexity(Objective):
    """The perplexity term of the context vectors and its inverse.

    Every context vector gets a soft label over its ``top_k`` nearest words (by cosine), and the
    text tower's state before it predicts a word through the tied token embedding. The two terms
    are the cross-entropies of one with the other, averaged over the vectors (over classes or
    images too, where each has its own). Of deep prompts only the vectors at the input live among
    words and get labels; every block that replaces its context wipes out what the states before it
    held, so that the perplexity term trains the last such block's vectors, and its inverse those at
    the input. Only words that the model was trained on count. The paper leaves the weight open: at
    0.1 the term has the size of the cross-entropy.

    top_k, temperature, inverse_weight, detach_targets: see ``vlfast.plpp_loss``.
    """

    kind = "perplexity"

    def __init__(
        self,
        weight: float = 0.1,
        *,
        top_k: int = 10,
        temperature: float = 1.0,
        inverse_weight: float = 1.0,
        detach_targets: bool = True,
    ) -> None:
        super().__init__(weight)
        if not 0 < temperature < math.inf:
            raise VlfastError(
                f"objectives: perplexity temperature: expected above 0, got {temperature}"
            )
        if not 0 <= inverse_weight < math.inf:
            raise VlfastError(
                f"objectives: perplexity inverse_weight: expected at least 0, got {inverse_weight}"
            )
        self.top_k = top_k
        self.temperature = temperature
        self.inverse_weight = inverse_weight
        self.detach_targets = detach_targets
        self._frozen: tuple[Tensor, Tensor, Tensor] | None = None

    def check(self, task: Task) -> None:
        clip, prompts = task.clip, task.prompts
        if prompts.context_vectors() is None:
            raise ValueError(
                f"objectives: perplexity needs context vectors in the text tower's input, "
                f"but {prompts.kind!r} prompts have none"
            )
        text = clip.text_tower
        if not text.text.causal or text.tokenizer.sot_token_id is None:
            raise ValueError(
                "objectives: perplexity needs a causal text tower whose texts begin with a start "
                f"token, so that states predict what follows, but {clip.name} has none"
            )
        known = int(clip.known_tokens.sum())
        if not 1 <= self.top_k <= known:
            raise ValueError(
                f"objectives: perplexity top_k={self.top_k}, expected 1 to {known}, "
                f"the words that {clip.name} knows"
            )

    def forward(self, step: Step) -> dict[str, Tensor]:
        embedding, inverse_norms, known = self._frozen_inputs(step.clip)
        states = step.text.context_states
        vectors = step.prompts.context_vectors(step.images if step.prompts.per_image else None)
        if vectors.ndim < states.ndim:
            vectors = vectors.expand_as(states)
        perplexity, inverted = plpp_terms(
            vectors.reshape(-1, vectors.shape[-1]),
            states.reshape(-1, states.shape[-1]),
            embedding,
            top_k=self.top_k,
            temperature=self.temperature,
            detach_targets=self.detach_targets,
            vocabulary=known,
            inverse_norms=inverse_norms,
        )
        return {
            "perplexity": perplexity.mean(),
            "inverse_perplexity": self.inverse_weight * inverted.mean(),
        }

    def _frozen_inputs(self, clip: ClipModel) -> tuple[Tensor, Tensor, Tensor | None]:
        """The embedding, its inverse norms and the mask, made once: they never change."""
        if self._frozen is None:
            embedding = clip.token_embedding
            norms = embedding.float().norm(dim=1).clamp_min(1e-12)
            known = None if bool(clip.known_tokens.all()) else clip.known_tokens.to(clip.device)
            self._frozen = (embedding, torch.reciprocal(norms), known)
        return self._frozen
