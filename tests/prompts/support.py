"""Prompt learning written out plainly: whole sequences of every class through whole blocks."""

from __future__ import annotations

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch.nn import functional

from tests.clip.support import TEXT
from tests.clip.vision_support import plain_features, vision_clip
from vlfast.clip.models import wrap_clip
from vlfast.prompts import build_prompts
from vlfast.prompts.classifier import PromptedClassifier

TOKENIZER = SimpleTokenizer()
NAMES = ("cat", "yellow school bus", "hen", "golden_retriever")
LABELS = torch.tensor([0, 3, 1, 2, 0, 1])
WORDS = "a photo of a"

# Name: kind, options, and what the plain version needs: frozen words, blocks with text prompts.
SETTINGS = {
    "cocoop": ("conditional", {"n_ctx": None, "init": WORDS}, {}),
    "cocoop_random": ("conditional", {"n_ctx": 3}, {}),
    "vpt": ("visual", {}, {"words": WORDS}),
    "vpt_shallow": ("visual", {"n_visual": 3, "visual_depth": 1}, {"words": WORDS}),
    "vpt_words": ("visual", {"init": "an icon of a", "n_visual": 1}, {"words": "an icon of a"}),
    "ivlp": (
        "independent",
        {"n_ctx": 2, "init": WORDS, "depth": 3, "n_visual": 2, "visual_depth": 4},
        {"words": "of a", "texts": 3},
    ),
    "promptsrc": (
        "independent",
        {"n_ctx": 4, "init": WORDS, "depth": 2, "n_visual": 4},
        {"texts": 2},
    ),
    "deep_language": ("independent", {"n_ctx": None, "init": WORDS, "depth": 3}, {"texts": 3}),
    "shallow": ("independent", {"n_ctx": 3, "n_visual": 1, "depth": 1}, {"texts": 1}),
    "maple": (
        "coupled",
        {"n_ctx": 2, "init": WORDS, "depth": 3},
        {"words": "of a", "texts": 3},
    ),
    "maple_shallow": ("coupled", {"n_ctx": None, "init": WORDS, "depth": 1}, {"texts": 1}),
}


def deep_clip(**vision):
    """Four blocks in the image tower, three in the text tower, features of 64."""
    torch.manual_seed(0)
    return wrap_clip(vision_clip(embed_dim=64, **vision), name="deep")


def resnet_clip():
    vision = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8, "head_width": 8}
    model = open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT)
    return wrap_clip(model, name="resnet")


def images(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator)


def make(clip, kind, **options):
    torch.manual_seed(3)
    prompts = build_prompts(kind, clip, num_classes=len(NAMES), **options)
    return PromptedClassifier(clip, prompts, NAMES, "a {} square.")


def shake(prompts):
    """Far from where they start, so that gradients are of some size."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def plain_text(model, text, n=0, context=None, deep=()):
    """Features [C, D] and final states [C, L, d] of the texts, whose first n tokens after SOS are
    replaced by the context, and again in deeper blocks."""
    length = model.positional_embedding.shape[0]
    ids = TOKENIZER(text, context_length=length)
    x = model.token_embedding(ids)

    def replaced(x, vectors):
        new = vectors.expand(len(x), -1, -1)
        return torch.cat([x[:, :1], new, x[:, 1 + n :]], dim=1)

    if n:
        x = replaced(x, context)
    x = x + model.positional_embedding
    for layer, block in enumerate(model.transformer.resblocks):
        if 0 < layer <= len(deep):
            x = replaced(x, deep[layer - 1])
        x = block(x, attn_mask=model.attn_mask)
    states = model.ln_final(x)
    return states[torch.arange(len(ids)), ids.argmax(dim=1)] @ model.text_projection, states


def plain_texts(words, n=0):
    """Texts with n placeholders, then the frozen words, then the name, as CoOp builds them."""
    start = " ".join(["X"] * n + ([words] if words else []))
    return [f"{start} {name.replace('_', ' ')}." for name in NAMES]


def plain_logits(model, images, classes):
    """images [B, D], classes [C, D] or [B, C, D], both not normalised."""
    images, classes = functional.normalize(images, dim=-1), functional.normalize(classes, dim=-1)
    classes = classes.expand(len(images), -1, -1)
    return model.logit_scale.exp() * (images.unsqueeze(1) * classes).sum(dim=-1)


def plain_model(kind, clip, learned, pixels, *, words="", texts=0):
    """Logits, context states and context vectors of a kind of prompts whose tensors are ``learned``
    by name. words: those that stay frozen; texts: blocks of the text tower with own prompts."""
    model = clip.model
    context = learned.get("context")
    n = 0 if context is None else len(context)
    text = plain_texts(words, n)
    deep = [learned[f"deep.{i}"] for i in range(texts - 1)]
    if kind == "conditional":
        features = plain_features(model, pixels, [])
        unit = functional.normalize(features, dim=-1)
        first, second = ("meta_net.linear1", "meta_net.linear2")
        hidden = (unit @ learned[f"{first}.weight"].T + learned[f"{first}.bias"]).clamp(min=0)
        bias = hidden @ learned[f"{second}.weight"].T + learned[f"{second}.bias"]
        each = [plain_text(model, text, n, context + row) for row in bias]
        classes = torch.stack([found for found, _ in each])
        states = torch.stack([states[0, :n] for _, states in each])
        vectors = torch.stack([context + row for row in bias])
        return plain_logits(model, features, classes), states, vectors
    if kind == "coupled":
        of_text = [context, *deep]
        visual = [
            x @ learned[f"projections.{i}.weight"].T + learned[f"projections.{i}.bias"]
            for i, x in enumerate(of_text)
        ]
    else:
        names = [name for name in learned if name.startswith("visual.")]
        visual = [learned[f"visual.{i}"] for i in range(len(names))]
    classes, states = plain_text(model, text, n, context, deep)
    logits = plain_logits(model, plain_features(model, pixels, visual), classes)
    return logits, states[0, :n], context
