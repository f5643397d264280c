"""The frozen token vectors that CoOp's prompt learners save: what they tell of the model, the class
names and the words that a file was trained with. Nothing of them is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlfast.clip.models import ClipModel
from vlfast.clip.tokens import PromptTokens
from vlfast.errors import VlfastError
from vlfast.prompts.context import words_behind

PREFIX, SUFFIX = "token_prefix", "token_suffix"
_WORDS = "a photo of a"  # what MaPLe's and PromptSRC's configs start from
_MOST_WORDS = 4  # tokens of a context that their code still starts from words

# Their vectors went through half precision, and PromptSRC averages them over its epochs.
_TOLERANCE = 0.05


def buffers(clip: ClipModel, tokens: PromptTokens, n_ctx: int) -> dict[str, Tensor]:
    """token_prefix [C, 1, d] and token_suffix [C, L - 1 - n_ctx, d] as a prompt learner of these
    class names has them, for the class name at the end ([CoOp] trainers/coop.py:98-110)."""
    length = clip.text_tower.context_length - 1 - n_ctx
    ids = torch.nn.functional.pad(tokens.suffix, (0, length - tokens.suffix.shape[1]))
    # Behind the last token of a class its row is padded with 0, CLIP's padding too.
    embedding = clip.token_embedding.float().cpu()
    start = embedding[tokens.sot].expand(len(ids), 1, -1)
    return {PREFIX: start, SUFFIX: embedding[ids]}


def check_model(tensors: Mapping[str, Tensor], prefix: str, clip: ClipModel, what: str) -> None:
    """Raise VlfastError where the file's frozen vectors are of another CLIP than ``clip``."""
    text, visual = clip.text_tower.text, clip.model.visual
    sot = clip.tokenizer.sot_token_id
    of_file = {
        f"{prefix}{PREFIX}": None if sot is None else clip.token_embedding[sot],
        "text_encoder.positional_embedding": text.positional_embedding,
        "image_encoder.class_embedding": getattr(visual, "class_embedding", None),
        "image_encoder.positional_embedding": getattr(visual, "positional_embedding", None),
    }
    for key, own in of_file.items():
        theirs = tensors.get(key)
        if theirs is None or own is None:
            continue
        if key.endswith(PREFIX) and theirs.ndim == 3 and len(theirs):
            theirs = theirs[0, 0]
        if theirs.shape != own.shape or not bool(_alike(theirs, own).all()):
            raise VlfastError(
                f"model: {what} was trained on another CLIP than {clip.name} ({clip.pretrained}): "
                f"its {key} is not that model's"
            )


def frozen_words(
    tensors: Mapping[str, Tensor], prefix: str, clip: ClipModel, n_ctx: int, own: Sequence[str]
) -> str | None:
    """The words that a context of deep prompts started from, where words behind the learned ones
    stay frozen ([MaPLe] trainers/maple.py); None where there are none.

    own: words to try before "a photo of a". Without a token_suffix the authors' own are assumed.
    """
    suffix = tensors.get(f"{prefix}{SUFFIX}")
    for words in dict.fromkeys([*own, _WORDS]):
        try:
            behind = words_behind(clip, n_ctx, words)
        except ValueError:
            continue
        if not behind:
            continue
        if suffix is None or suffix.ndim != 3 or not len(suffix):
            return words if n_ctx <= _MOST_WORDS else None
        ids = clip.tokenizer.encode(f" {behind}")
        expected = clip.token_embedding[ids]
        found = suffix[0, : len(ids)]
        if found.shape == expected.shape and bool(_alike(found, expected).all()):
            return words
    return None


def check_names(
    tensors: Mapping[str, Tensor],
    prefix: str,
    clip: ClipModel,
    classnames: Sequence[str],
    tokens: PromptTokens,
    n_ctx: int,
    *,
    strict: bool,
    what: str,
) -> None:
    """Warn, or raise VlfastError if ``strict``, where the file was trained with other class names.

    A file without a token_suffix says nothing of them.
    """
    suffix = tensors.get(f"{prefix}{SUFFIX}")
    if suffix is None or suffix.ndim != 3:
        return
    if len(suffix) != len(classnames):
        differs = f"{len(suffix)} classes, and not the {len(classnames)} of these data"
    else:
        expected = buffers(clip, tokens, n_ctx)[SUFFIX]
        if expected.shape != suffix.shape:
            return
        wrong = (~_alike(suffix, expected).all(dim=1)).nonzero().flatten().tolist()
        if not wrong:
            return
        theirs = _read_text(clip, suffix[wrong[0]])
        differs = (
            f"other class names: of class {wrong[0]} it has {theirs!r}, and these data have "
            f"{classnames[wrong[0]]!r} ({len(wrong)} of {len(classnames)} differ)"
        )
    message = f"data: {what} was trained with {differs}; see data.name and data.classes"
    if strict:
        raise VlfastError(message)
    warnings.warn(message, stacklevel=3)


def _read_text(clip: ClipModel, vectors: Tensor) -> str:
    """The text whose token embeddings are nearest, up to its end."""
    vectors = vectors.float().to(clip.device)[:32]
    ids = torch.cdist(vectors, clip.token_embedding.float()).argmin(dim=1).tolist()
    end = clip.tokenizer.eot_token_id
    return clip.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids).strip()


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """bool [...] of vectors [..., d]."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return (a - b).norm(dim=-1) <= _TOLERANCE * b.norm(dim=-1) + 1e-6
