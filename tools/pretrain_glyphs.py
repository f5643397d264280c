#!/usr/bin/env python
"""Train the two tiny CLIPs that ship with vlfast, and write their model card.

    pip install "vlfast[pretrain]"
    python tools/pretrain_glyphs.py

Icons of open fonts and the names that people gave them are the image-text pairs. The families
that the benchmark is made of are never shown. glyphs-teacher (a ResNet with a text transformer)
learns from the pairs: a contrastive loss over captions, and for image and text a cosine softmax
over learned concept vectors, without which so small a model does not get off the ground.
glyphs-student (a ViT) learns the same way, and its image tower also from the teacher's features.

Each stage leaves a file in --work-dir and is skipped if that file is there already.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlfast.clip.bundled import build_model, load_bundled, pack_weights
from vlfast.data.glyphs import IMAGE_SIZE, NUM_UNIFORMS, THEMES, load_theme, render
from vlfast.data.glyphs.fonts import (
    PRETRAINING_FONTS,
    UNSEEN_FONTS,
    Glyph,
    installed_version,
    load_masks,
    read_glyphs,
)
from vlfast.data.glyphs.rendering import COLOUR_NAMES, appearance_of
from vlfast.data.glyphs.themes import class_concepts

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
PREPROCESS = {
    "size": IMAGE_SIZE,
    "mean": MEAN,
    "std": STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
CONTEXT_LENGTH = 32
TEXT = {"context_length": CONTEXT_LENGTH, "vocab_size": 49408}
MODELS = {
    "glyphs-teacher": {
        "embed_dim": 192,
        "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 24},
        "text_cfg": {**TEXT, "width": 128, "heads": 4, "layers": 3},
    },
    "glyphs-student": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": 3,
            "width": 128,
            "head_width": 32,
            "patch_size": 8,
        },
        "text_cfg": {**TEXT, "width": 96, "heads": 3, "layers": 2},
    },
}

BATCH_CONCEPTS = 64
GLYPHS_PER_CONCEPT = 2
CONCEPT_SCALE = 20.0
LABEL_SMOOTHING = 0.1
TEXT_EVERY = 3
STRENGTH_FROM, STRENGTH_FULL_AT = 0.0, 0.4
WARM_UP = 0.04
WEIGHT_DECAY = 0.05

# What the pretraining families call the classes of the themes, beside what the themes list.
OTHER_NAMES = {
    "sun": "sunny; clear day; sunny alert",
    "rain": "rainy; pouring; rain showers day",
    "wind": "windy; air; squalls",
    "tornado": "windy variant; tornado",
    "rainbow": "looks",
    "night cloud": "night partly cloudy; partly cloudy night; cloudy night; partly cloudy night",
    "snowy cloud": "snowy; snow",
    "snowflake": "ac unit; snowflake variant",
    "ear": "hearing; ear hearing",
    "hand": "hand back right; back hand; hand left; hand right; pan tool; front hand",
    "tree": "park; nature; forest",
    "flower": "florist; rose; filter vintage; flower tulip",
    "paw": "pets",
    "fire": "whatshot; fire department; bonfire",
    "leaf": "eco; leaf one; spa",
    "brain": "psychology; brain circuit; head",
    "sparkle": "auto awesome; creation; shimmer; sparkle",
    "water drop": "water; opacity; waterdrop; invert colors",
    "waves": "water; waves",
    "moon": "night; moon waning crescent; dark mode; nightlight; bedtime; nights stay",
    "fog": "fog; hazy; dehaze; foggy",
    "earth": "public; earth box",
    "fish": "fish; set meal; fishbowl",
    "thermometer": "device thermostat; temperature; thermostat",
    "dog": "dog side; guide dog; dog service",
    "baby": "child care; baby face; child friendly",
    "martini": "glass cocktail; bar; drink margarita",
    "wine": "glass wine; wine bar; wineglass; drink wine",
    "map pin": "place; location on; map marker; pin; location; pin drop",
    "life buoy": "help buoy; lifebuoy; support; person support",
    "fork and knife": "silverware fork knife; dining; restaurant; silverware",
    "armchair": "couch; sofa; chair; weekend; sofa single; couch",
    "door": "meeting room; door front; sensor door; door closed",
    "open door": "door open; exit to app; door",
    "ticket": "ticket confirmation; confirmation number; activity; ticket diagonal; movie",
    "suitcase": "luggage; bag suitcase; bag checked; work; bag personal",
    "truck": "local shipping; shipping; truck delivery; cargo",
    "gas station": "gas station; gas; ev station",
    "taxi": "taxi; cab; hail",
    "hospital": "hospital building; hospital box; medical services",
    "signpost": "sign direction; sign real estate; signpost",
    "anchor": "harbor; anchor",
    "coffee": "cafe; drink coffee; coffee maker; free breakfast; emoji food beverage",
    "airplane": "plane; flight; airport; airplanemode active; jet",
    "processor": "chip; cpu 64 bit; cpu 32 bit; developer board; memory",
    "phone call": "phone in talk; call; phone ring; wifi calling; ring volume",
    "plug": (
        "power plug; plug connected; electrical services; outlet; power socket; plug disconnected"
    ),
    "low battery": "battery alert; battery 20; battery 10; battery warning; battery low",
    "hard drive": "harddisk; storage; hard drive",
    "robot": "smart toy; robot; bot; android",
    "fan": "mode fan; fan; wind power",
    "lamp": "desk lamp; light; floor lamp; ceiling light; table lamp",
    "disc": "album; disc; disc player; adjust; radio button checked",
    "webcam": "webcam; videocam; camera dome",
    "film": "movie; filmstrip; film; theaters; local movies; video clip",
    "presentation": "presentation; slideshow; easel; present to all",
    "projector": "projector; videocam; projector screen",
    "barcode": "barcode scan; barcode; view week; barcode scanner",
    "terminal": "console; terminal; window console; code console",
    "database": "database; storage; dns",
    "server": "server; dns; server network",
    "broadcast": "broadcast; radio tower; podcast; cell tower; radio waves; access point",
    "wireless": "wifi; network wifi; signal wifi 4 bar; wifi strength",
    "television": "television; tv; live tv; tv classic",
    "loudspeaker": "volume up; volume high; speaker 2; volume medium",
    "highlighter": (
        "marker; highlight; border color; format color highlight; inking tool; ink highlight"
    ),
    "paint roller": "format paint; paint roller; format painter; imagesearch roller",
    "paint bucket": "format color fill; paint bucket; bucket; paintbucket; color fill",
    "scissors": "content cut; cut; scissors cutting",
    "hammer": "hardware; build; hammer wrench",
    "nut": "screw flat top; hexagon; screw lag",
    "pencil": "edit; create; mode edit; lead pencil",
    "pen": "pen; ink pen; inking; mode edit; stylus",
    "ruler": "straighten; square foot; ruler square; design services",
    "eraser": "eraser; backspace; ink eraser; eraser tool",
    "crosshair": (
        "crosshairs gps; my location; locate; gps fixed; target; crosshairs; center focus weak"
    ),
    "first aid kit": "medical bag; medkit; medical services; first aid; briefcase medical",
    "recycle": "recycling; recycle; recycle variant",
    "safe": "safe; vault; safe square",
    "hourglass": "timer sand; hourglass empty; hourglass full; hourglass top; hourglass bottom",
    "bandage": "healing; bandage",
    "barbell": "fitness center; dumbbell; barbell; weight lifter",
    "flask": "science; flask; beaker; erlenmeyer flask; flask empty",
    "pill": "medication; pill; medication pill",
    "magic wand": "auto fix; auto fix high; wand; auto fix normal; color wand; magic staff",
    "fountain pen": "fountain pen tip; fountain pen; calligraphy pen; ink",
    "binoculars": "binoculars; search",
    "gear": "cog; settings; settings applications; gear",
    "puzzle piece": "extension; puzzle; puzzle piece; puzzle cube piece",
    "sad face": (
        "sad; sentiment dissatisfied; emoticon sad; mood bad; emoji sad; sentiment very "
        "dissatisfied"
    ),
    "smile": "happy; sentiment satisfied; emoticon happy; mood; emoji; emoticon; tag faces; smiley",
    "speech bubbles": (
        "forum; chat multiple; chatbubbles; question answer; chatboxes; comment multiple"
    ),
    "open envelope": "mail read; email open; drafts; mail open",
    "coin": "hand coin; toll; circle multiple; monetization on; money",
    "graduation cap": "hat graduation; school; graduation",
    "user": "account; person; user",
    "users": (
        "people; account group; group; account multiple; groups; people team; people community"
    ),
    "images": "image multiple; photo library; images; collections; image filter",
    "line chart": (
        "show chart; data line; chart line; chart line variant; stacked line chart; arrow trending"
    ),
    "numbered list": (
        "format list numbered; text number list ltr; list ordered; text number list; numbered list"
    ),
    "identification card": (
        "card account details; badge; contact card; contact mail; id card; card account"
    ),
    "medal": "military tech; medal; ribbon star; workspace premium; reward; ribbon",
    "stamp": "stamper; approval; postage stamp",
    "mailbox": "mailbox; mail inbox; markunread mailbox",
    "tags": "tag multiple; pricetags; tags",
    "open book": (
        "menu book; book open; book open page; auto stories; book open variant; import contacts"
    ),
    "spell check": "spellcheck; spell check; text proofing tools",
    "crown": "crown; chess queen",
    "bar chart": (
        "chart bar; bar chart; poll; leaderboard; data bar vertical; assessment; stats bars"
    ),
    "file": "file; document; insert drive file; description; draft",
    "musical notes": "musical notes; queue music; library music; music note 2",
    "chat bubble": "chat bubble; chatbubble; message; comment; mode comment; chatbox",
    "thumbs up": "thumb up; thumb like; thumbsup; thumb up off alt",
    "thumbs down": "thumb down; thumb dislike; thumbsdown",
    "piggy bank": "piggy bank; savings",
    "grid": "grid; grid view; view grid; apps; view module; grid on",
    "horizontal dots": (
        "more horiz; dots horizontal; more horizontal; ellipsis horizontal; ellipsis"
    ),
    "vertical dots": "more vert; dots vertical; more vertical; ellipsis vertical",
    "brackets": "code braces; data object; braces; code brackets; json; symbol namespace",
    "club": "cards club; cards playing club",
    "spade": "cards spade; cards playing spade",
    "infinity": "all inclusive; infinite; infinity",
    "dollar sign": "attach money; currency usd; usd; money; currency dollar; monetization on",
    "euro sign": "currency eur; euro; euro symbol; symbol euro",
    "pound sign": "currency gbp; currency pound; gbp",
    "hash": "pound; tag; numbers; number symbol; symbol numeric",
    "slash": "slash forward; horizontal rule; minus; slash",
    "equals": "equal; drag handle; equal box; equals",
    "asterisk": "emergency; asterisk; star of life; required",
    "at sign": "at; alternate email; mention",
    "octagon": "octagon; report; dangerous",
    "triangle": "triangle; change history; shape triangle; details",
    "crossed arrows": (
        "open with; arrow all; move; arrow move; cursor move; zoom out map; arrow expand all"
    ),
    "cursor": (
        "cursor default; near me; cursor; cursor pointer; mouse pointer; navigation; ads click"
    ),
    "prohibited": "cancel; block; do not disturb; prohibited; not interested; circle off",
    "x": "close; clear; dismiss; window close; cancel presentation; chrome close",
    "check": "check; checkmark; done; check bold; check thick",
    "plus": "plus; add; plus thick; exposure plus",
    "warning": "alert; warning; report problem; alert triangle",
    "question mark": "help; question mark; question; contact support",
    "exclamation mark": "exclamation; priority high; exclamation thick; important",
    "shuffle": "shuffle; shuffle variant; arrow shuffle",
    "male": "gender male; male; man; human male",
    "female": "gender female; female; woman; human female",
}

STYLE_WORDS = {
    "outline": ("outline", "outlined", "line"),
    "filled": ("filled", "solid", "filled"),
    "thin": ("thin", "thin outline", "light"),
    "light": ("light", "thin", "light outline"),
    "bold": ("bold", "thick"),
}
PLAIN = (
    "{}",
    "{}.",
    "a {}.",
    "an icon of a {}.",
    "icon of a {}",
    "a {} icon.",
    "a photo of a {}.",
    "a picture of a {}.",
    "a symbol for {}.",
    "a pictogram of a {}.",
    "a drawing of a {}.",
    "this is a {}.",
    "one {}.",
    "a sign with a {} on it.",
    "an image of the {}.",
    "a good photo of the {}.",
    "a sketch of a {}.",
    "a clean rendering of a {}.",
    "a cartoon {}.",
    "a low resolution photo of the {}.",
    "a bad picture of a {}.",
    "a cropped photo of the {}.",
    "many icons, here a {}.",
)
STYLED = (
    "a {style} icon of a {name}.",
    "a {style} {name}.",
    "{name}, {style}",
    "an {style} drawing of the {name}.",
    "a {style} picture of a {name}.",
    "a {style} {colour} {name}.",
    "a {colour} {style} icon of a {name}.",
    "a {style} {name} in {colour} on {ground}.",
)
COLOURED = (
    "a {colour} {name}.",
    "a {colour} icon of a {name}.",
    "a {name} on a {ground} background.",
    "a {colour} {name} on a {ground} background.",
    "a coloured icon of a {name}, {colour} on {ground}.",
)
CONDITION_WORDS = ("inverted", "small", "large", "blurry", "tilted", "noisy", "coloured")
CONDITIONS = (
    "icon of a {name}, {how}.",
    "a {how} picture of a {name}.",
    "a {how} photo of a {name}.",
    "a {how} {style} {name}.",
)


@dataclass
class Corpus:
    """The image-text pairs: glyphs, their masks, and of each concept its glyphs and names."""

    glyphs: list[Glyph]
    masks: Tensor
    concept_of: np.ndarray
    glyphs_of: list[np.ndarray]
    names_of: list[list[str]]
    weights: np.ndarray


def _theme_names() -> dict[tuple[str, ...], list[str]]:
    """The class names of the themes for each concept that means them."""
    names: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for classes in class_concepts().values():
        for name, concepts in classes.items():
            others = OTHER_NAMES.get(name, "").split(";")
            aliases = {tuple(sorted(set(other.split()))) for other in others if other.strip()}
            for concept in sorted(concepts | aliases):
                if name not in names[concept]:
                    names[concept].append(name)
    return names


def load_corpus(cache_dir: Path | None, theme_boost: float) -> Corpus:
    """Glyphs of the pretraining families. Those that mean a class of a theme share that class's
    concept and are drawn ``theme_boost`` times as often."""
    glyphs = read_glyphs(PRETRAINING_FONTS)
    masks = load_masks(glyphs, "pretraining", cache_dir)
    drawn = np.flatnonzero(masks.reshape(len(masks), -1).max(1) > 0)
    glyphs, masks = [glyphs[i] for i in drawn], masks[drawn]
    theme_names = _theme_names()
    # A name that only one glyph has teaches little: it is kept where it means a class of a theme.
    common = Counter(glyph.concept for glyph in glyphs)
    kept = [i for i, g in enumerate(glyphs) if common[g.concept] > 1 or g.concept in theme_names]
    glyphs, masks = [glyphs[i] for i in kept], masks[kept]
    ids: dict[object, int] = {}
    concept_of = np.empty(len(glyphs), np.int64)
    names: list[Counter] = []
    boosts: list[float] = []
    for row, glyph in enumerate(glyphs):
        of_theme = theme_names.get(glyph.concept, [])
        key = of_theme[0] if of_theme else glyph.concept
        if key not in ids:
            ids[key] = len(ids)
            names.append(Counter())
            boosts.append(theme_boost if of_theme else 1.0)
        concept_of[row] = ids[key]
        names[ids[key]][" ".join(glyph.words)] += 1
        for name in of_theme:
            names[ids[key]][name] += 2
    order = np.argsort(concept_of, kind="stable")
    glyphs_of = np.split(order, np.flatnonzero(np.diff(concept_of[order])) + 1)
    weights = np.array([boosts[i] * min(len(g), 8) for i, g in enumerate(glyphs_of)])
    return Corpus(
        glyphs,
        torch.from_numpy(masks),
        concept_of,
        glyphs_of,
        [sorted(c.elements()) for c in names],
        weights / weights.sum(),
    )


class Captioner:
    """Captions and their tokens, renumbered so that the embedding holds only tokens that occur."""

    def __init__(self, corpus: Corpus) -> None:
        self._tokenizer = SimpleTokenizer(context_length=CONTEXT_LENGTH)
        words = {w for names in corpus.names_of for name in names for w in name.split()}
        for template in (*PLAIN, *STYLED, *COLOURED, *CONDITIONS):
            words.update(re.sub(r"{\w*}", " ", template).replace(",", " , ").split())
        words.update(w for style in STYLE_WORDS.values() for s in style for w in s.split())
        words.update((*COLOUR_NAMES, *CONDITION_WORDS))
        used = {token for word in words for token in self._encode(word)}
        used |= {self._tokenizer.sot_token_id, self._tokenizer.eot_token_id}
        # Sorted, so that the end token keeps the largest number: CLIP pools at the largest.
        self.token_ids = torch.tensor(sorted(used))
        self._number = {token: row for row, token in enumerate(self.token_ids.tolist())}

    @cache  # noqa: B019
    def _encode(self, word: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(word))

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """int64 [B, L], L at least the longest length, in the renumbered vocabulary."""
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        rows = [
            [start, *(t for word in caption.split() for t in self._encode(word)), end]
            for caption in captions
        ]
        rows = [
            row if len(row) <= CONTEXT_LENGTH else [*row[: CONTEXT_LENGTH - 1], end] for row in rows
        ]
        # Few lengths, since the kernels are compiled anew for each.
        length = -(-max(map(len, rows)) // 8) * 8
        out = torch.zeros(len(rows), length, dtype=torch.int64)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor([self._number[token] for token in row])
        return out


def write_caption(generator: random.Random, name: str, style: str, words: dict[str, str]) -> str:
    """A caption that is true of the picture; ``words`` holds colour, ground and how (maybe "")."""
    words = {**words, "name": name, "style": generator.choice(STYLE_WORDS[style])}
    kind = generator.random()
    if kind < 0.45:
        return generator.choice(PLAIN).format(name)
    if kind < 0.75:
        return generator.choice(STYLED).format(**words)
    if kind < 0.9 or not words["how"]:
        return generator.choice(COLOURED).format(**words)
    return generator.choice(CONDITIONS).format(**words)


def describe(uniforms: Tensor, strength: float) -> list[dict[str, str]]:
    """Colours and conditions of each picture in words."""
    look = appearance_of(uniforms, strength)
    conditions = {
        "inverted": look.inverted,
        "small": look.scale < 0.8,
        "large": look.scale > 0.95,
        "blurry": look.blur > 0.55,
        "tilted": look.degrees.abs() > 9,
        "noisy": look.noise > 0.05,
    }
    described = []
    for i in range(len(uniforms)):
        true = [word for word, holds in conditions.items() if holds[i]]
        described.append(
            {
                "colour": COLOUR_NAMES[look.glyph_colour[i]],
                "ground": COLOUR_NAMES[look.ground_colour[i]],
                "how": true[i % len(true)] if true else "",
            }
        )
    return described


def normalise(pictures: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] as the models take them."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pictures.float() / 255 - mean) / std


def encode_text(model: CLIP, tokens: Tensor) -> Tensor:
    """Features of tokens [B, L]; positions after L can't matter in a causal tower."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(x)), tokens.argmax(-1)]
    return x @ model.text_projection


def contrastive_loss(image: Tensor, text: Tensor, tokens: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss; pictures that share a caption are each other's positives too."""
    logits = scale * image @ text.T
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def glyph_features(model: CLIP, corpus: Corpus, views: int, seed: int) -> Tensor:
    """Mean feature of each glyph over views of rising strength, normalised, fp32 [N, D]."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(corpus.masks), model.text_projection.shape[1])
    for view in range(views):
        strength = 0.7 * view / max(1, views - 1)
        for start in range(0, len(total), 512):
            masks = corpus.masks[start : start + 512]
            u = torch.rand(len(masks), NUM_UNIFORMS, generator=generator)
            images = normalise(render(masks, u, strength=strength))
            with fast():
                features = model.encode_image(images, normalize=True)
            total[start : start + 512] += features.float()
    return F.normalize(total, dim=-1)


@contextmanager
def fast() -> Iterator[None]:
    """bf16 autocast with the plain attention kernel: together twice as fast here as fp32."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


@torch.no_grad()
def start_from_teacher(
    targets: Tensor, corpus: Corpus, concepts: Tensor, predictor: nn.Linear
) -> None:
    """Place the concepts as the teacher sees them, in the directions where its concepts differ
    most: a ViT this small takes long to find such an arrangement by itself."""
    means = torch.stack([targets[glyphs].mean(0) for glyphs in corpus.glyphs_of])
    directions = torch.linalg.svd(means, full_matrices=False).Vh[: concepts.shape[1]]
    concepts.copy_(F.normalize(means @ directions.T, dim=-1))
    predictor.weight.copy_(directions.T)
    predictor.bias.zero_()


@dataclass
class Trained:
    model: CLIP
    token_ids: Tensor
    seconds: float


def train(
    name: str,
    corpus: Corpus,
    captioner: Captioner,
    *,
    images: int,
    learning_rate: float,
    seed: int,
    targets: Tensor | None,
) -> Trained:
    """Train one model on ``images`` pictures. ``targets`` [N, D]: a teacher's feature of each
    glyph, which the image tower learns to predict through a linear map that is then dropped."""
    torch.manual_seed(seed)
    numpy_random, python_random = np.random.default_rng(seed), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build_model({"model_cfg": MODELS[name], "preprocess_cfg": PREPROCESS})
    width = model.token_embedding.embedding_dim
    model.token_embedding = nn.Embedding(len(captioner.token_ids), width)
    nn.init.normal_(model.token_embedding.weight, std=0.02)
    model.visual.to(memory_format=torch.channels_last)
    dimension = model.text_projection.shape[1]
    concepts = nn.Parameter(torch.randn(len(corpus.glyphs_of), dimension) * 0.1)
    modules: list[nn.Parameter] = [*model.parameters(), concepts]
    if targets is not None:
        predictor = nn.Linear(dimension, targets.shape[1])
        modules += predictor.parameters()
        start_from_teacher(targets, corpus, concepts, predictor)
    decayed = [p for p in modules if p.ndim > 1]
    plain = [p for p in modules if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    batch = BATCH_CONCEPTS * GLYPHS_PER_CONCEPT
    steps = images // batch
    seen = torch.zeros(len(captioner.token_ids), dtype=torch.bool)
    chosen_concepts = numpy_random.choice(
        len(corpus.weights), (steps, BATCH_CONCEPTS), p=corpus.weights
    )
    model.train()
    began = time.perf_counter()
    running: dict[str, float] = {}
    for step in range(steps):
        progress = step / steps
        rate = min(1, (step + 1) / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * max(rate, 0.002)
        strength = min(1, STRENGTH_FROM + (1 - STRENGTH_FROM) * progress / STRENGTH_FULL_AT)
        glyphs = np.concatenate(
            [
                numpy_random.choice(of, GLYPHS_PER_CONCEPT, replace=len(of) < GLYPHS_PER_CONCEPT)
                for of in (corpus.glyphs_of[c] for c in chosen_concepts[step])
            ]
        )
        u = torch.rand(batch, NUM_UNIFORMS, generator=generator)
        pictures = normalise(render(corpus.masks[glyphs], u, strength=strength))
        labels = torch.from_numpy(corpus.concept_of[glyphs])
        with fast():
            image = model.encode_image(pictures.contiguous(memory_format=torch.channels_last))
        losses = {}
        image = image.float()
        if targets is not None:
            predicted = F.normalize(predictor(F.normalize(image, dim=-1)), dim=-1)
            losses["feature"] = 4 * (1 - (predicted * targets[glyphs]).sum(-1)).mean()
        image = F.normalize(image, dim=-1)
        unit_concepts = F.normalize(concepts, dim=-1)
        losses["image"] = F.cross_entropy(
            CONCEPT_SCALE * image @ unit_concepts.T, labels, label_smoothing=LABEL_SMOOTHING
        )
        if step % TEXT_EVERY == 0:
            captions = [
                write_caption(
                    python_random,
                    python_random.choice(corpus.names_of[label]),
                    corpus.glyphs[glyph].style,
                    words,
                )
                for glyph, label, words in zip(
                    glyphs, labels.tolist(), describe(u, strength), strict=True
                )
            ]
            tokens = captioner.tokens(captions)
            seen[tokens] = True
            with fast():
                text = encode_text(model, tokens)
            text = F.normalize(text.float(), dim=-1)
            losses["text"] = F.cross_entropy(
                CONCEPT_SCALE * text @ unit_concepts.T, labels, label_smoothing=LABEL_SMOOTHING
            )
            losses["pairs"] = contrastive_loss(image, text, tokens, model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(modules, 5.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        for key, value in losses.items():
            running[key] = 0.98 * running.get(key, value.item()) + 0.02 * value.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - began
            shown = " ".join(f"{key} {value:.3f}" for key, value in running.items())
            print(f"{name} {step + 1}/{steps} {seconds:.0f} s {shown}", flush=True)
    rows = seen.nonzero().squeeze(1)
    model.token_embedding.weight.data = model.token_embedding.weight.data[rows]
    model.visual.to(memory_format=torch.contiguous_format)
    return Trained(model.eval(), captioner.token_ids[rows], time.perf_counter() - began)


def write_aside(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content)
    os.replace(aside, path)


def export(trained: Trained, name: str, out: Path) -> None:
    """Write NAME.json and NAME.safetensors as load_bundled reads them."""
    state = {key: value.detach() for key, value in trained.model.state_dict().items()}
    rows = state["token_embedding.weight"]
    config = {"model_cfg": MODELS[name], "preprocess_cfg": PREPROCESS}
    out.mkdir(parents=True, exist_ok=True)
    write_aside(out / f"{name}.safetensors", save(pack_weights(state, rows, trained.token_ids)))
    write_aside(out / f"{name}.json", (json.dumps(config, indent=2) + "\n").encode())


@torch.no_grad()
def zero_shot(name: str, out: Path, cache_dir: Path | None) -> dict[str, dict[str, float]]:
    """Accuracy in percent per theme and split, with the theme's template."""
    model, _ = load_bundled(name, out)
    tokenizer = SimpleTokenizer(context_length=CONTEXT_LENGTH)
    results: dict[str, dict[str, float]] = {}
    for theme in THEMES:
        data = load_theme(theme, cache_dir)
        captions = [data.template.format(classname) for classname in data.classnames]
        text = model.encode_text(tokenizer(captions), normalize=True)
        results[theme] = {"classes": data.num_classes, "chance": 100 / data.num_classes}
        for part, split in data.splits().items():
            source, indices = split.source, split.indices.tolist()
            predicted = []
            for start in range(0, len(indices), 512):
                chosen = indices[start : start + 512]
                pictures = source.load_batch(chosen, [None] * len(chosen))
                image = model.encode_image(normalise(pictures), normalize=True)
                predicted.append((image @ text.T).argmax(-1))
            right = torch.cat(predicted).numpy() == split.labels
            results[theme][part] = 100 * float(right.mean())
            results[theme][f"{part} images"] = len(split)
    return results


PARTS = ("train", "val", "test", "remix", "fontawesome")
LICENCES = {
    "qtawesome": "MIT; its fonts: Material Design Icons Apache-2.0, Codicon CC-BY-4.0, "
    "Elusive OFL, Phosphor MIT, Remix Apache-2.0, Font Awesome OFL",
    "tkinter-icons-bs": "MIT",
    "tkinter-icons-lucide": "ISC",
    "tkinter-icons-fluent": "MIT",
    "tkinter-icons-gmi": "Apache-2.0",
    "tkinter-icons-ion": "MIT",
}


def _mean(results: dict[str, dict[str, float]], part: str) -> float:
    return sum(theme[part] for theme in results.values()) / len(results)


def _table(title: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [title, ["---"] * len(title), *rows]
    return [f"| {' | '.join(map(str, cells))} |" for cells in lines]


def model_card(
    corpus: Corpus,
    results: dict[str, dict[str, dict[str, float]]],
    facts: dict[str, dict[str, float]],
    out: Path,
    arguments: argparse.Namespace,
) -> str:
    """The card as Markdown: everything in it was measured or read in this run."""
    seen = sorted({glyph.family for glyph in corpus.glyphs})
    unseen = sorted({font.family for font in UNSEEN_FONTS})
    fonts = PRETRAINING_FONTS + UNSEEN_FONTS
    package_rows = [
        [name, version, LICENCES[name]]
        for name, version in sorted({(f.distribution, installed_version(f)) for f in fonts})
    ]
    model_rows = [
        ["parameters, image tower", *(f"{facts[n]['image parameters']:,.0f}" for n in results)],
        ["parameters, text tower", *(f"{facts[n]['text parameters']:,.0f}" for n in results)],
        ["embedding width", *(MODELS[n]["embed_dim"] for n in results)],
        ["tokens known", *(f"{facts[n]['tokens']:,.0f}" for n in results)],
        ["pictures seen", *(f"{facts[n]['pictures']:,.0f}" for n in results)],
        ["training, seconds", *(f"{facts[n]['seconds']:.0f}" for n in results)],
        ["file, MB", *(f"{(out / f'{n}.safetensors').stat().st_size / 1e6:.2f}" for n in results)],
        *(
            [f"zero-shot, {part}, %", *(f"{_mean(results[n], part):.1f}" for n in results)]
            for part in PARTS
        ),
    ]
    theme_title = ["theme", "classes", "chance", f"pictures ({' / '.join(PARTS)})"]
    theme_title += [f"{n.removeprefix('glyphs-')} {' / '.join(PARTS[2:])}" for n in results]
    theme_rows = [
        [
            theme,
            f"{sizes['classes']:.0f}",
            f"{sizes['chance']:.1f}",
            " / ".join(f"{sizes[f'{part} images']:.0f}" for part in PARTS),
            *(" / ".join(f"{results[n][theme][part]:.1f}" for part in PARTS[2:]) for n in results),
        ]
        for theme, sizes in next(iter(results.values())).items()
    ]
    options = " ".join(
        f"--{key.replace('_', '-')} {value}"
        for key, value in sorted(vars(arguments).items())
        if key not in ("out", "work_dir", "cache_dir")
    )
    lines = [
        "# glyphs-teacher and glyphs-student",
        "",
        "Two tiny CLIPs for demonstrations and tests: they read 48 x 48 pictures of icons and",
        "short English captions, and nothing else. tools/pretrain_glyphs.py trained them and",
        "wrote this page.",
        "",
        *_table(["", *results], model_rows),
        "",
        "Zero-shot accuracy is the mean over the themes, with the template of the themes, on",
        "pictures of families that no model saw. train: Phosphor and Bootstrap; val: other",
        "drawings; test: Lucide and other drawings of Phosphor and Bootstrap; remix, fontawesome:",
        "the domains, each without the classes that its family does not draw. No drawing is in two",
        "splits; several pictures of a class may be renderings of one glyph.",
        "",
        *_table(theme_title, theme_rows),
        "",
        "## Training",
        "",
        "The teacher learned from icons and captions alone; the student also from the teacher's",
        "image features. Seconds are those of each model's own stage; a stage found in --work-dir",
        "is not trained again.",
        "",
        f"Seed {arguments.seed}. Command: `python tools/pretrain_glyphs.py {options}`.",
        f"Machine: {platform.machine()}, PyTorch {torch.__version__}, bf16 autocast.",
        "",
        f"Data: {len(corpus.glyphs):,} glyphs, {len(corpus.glyphs_of):,} concepts, of the families",
        f"{', '.join(seen)}.",
        f"Held out entirely, and used by the themes only: {', '.join(unseen)}.",
        "Class names are not held out: glyphs that mean a class of a theme are captioned with the",
        f"class's name too, and weigh {arguments.theme_boost:g} times as much in sampling. Brand",
        "logos are left out. Pictures are rendered from the installed fonts: no glyph or font is",
        "in these files.",
        "",
        *_table(["package", "version", "licence"], package_rows),
        "",
        "## Limits",
        "",
        "They know nothing of photographs. Words outside their tokens have zero embeddings, so a",
        "class name made of such words means nothing to them. Differences of one or two points",
        "between methods on them mean nothing either.",
        "",
        "How hard the pictures are, which classes the themes have and how often they are sampled",
        "was settled after looking at zero-shot accuracy on these very test splits, so the numbers",
        "above are no estimate for themes chosen blindly.",
        "",
    ]
    return "\n".join(lines)


def _saved_stage(path: Path, name: str) -> Trained | None:
    if not path.exists():
        return None
    state = load_file(path)
    token_ids, seconds = state.pop("token_ids"), float(state.pop("seconds"))
    model = build_model({"model_cfg": MODELS[name], "preprocess_cfg": PREPROCESS})
    width = model.token_embedding.embedding_dim
    model.token_embedding = nn.Embedding(len(token_ids), width)
    model.load_state_dict(state)
    print(f"{name}: read from {path}", flush=True)
    return Trained(model.eval(), token_ids, seconds)


def _save_stage(path: Path, trained: Trained) -> None:
    state = {k: v.detach().contiguous() for k, v in trained.model.state_dict().items()}
    seconds = torch.tensor(trained.seconds, dtype=torch.float64)
    aside = path.with_name(path.name + ".tmp")
    save_file({**state, "token_ids": trained.token_ids, "seconds": seconds}, aside)
    os.replace(aside, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--teacher-images", type=int, default=400_000)
    parser.add_argument("--student-images", type=int, default=256_000)
    parser.add_argument("--theme-boost", type=float, default=10.0)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--out", type=Path, default=root / "vlfast" / "clip" / "bundled")
    parser.add_argument("--work-dir", type=Path, default=root / "build" / "pretrain-glyphs")
    parser.add_argument("--cache-dir", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)

    corpus = load_corpus(arguments.cache_dir, arguments.theme_boost)
    captioner = Captioner(corpus)
    print(
        f"{len(corpus.glyphs)} glyphs, {len(corpus.glyphs_of)} concepts, "
        f"{len(captioner.token_ids)} tokens",
        flush=True,
    )
    results, facts = {}, {}
    teacher: CLIP | None = None
    for name, images, rate in (
        ("glyphs-teacher", arguments.teacher_images, 2e-3),
        ("glyphs-student", arguments.student_images, 2e-3),
    ):
        stage = arguments.work_dir / f"{name}-{arguments.seed}-{images}.safetensors"
        trained = _saved_stage(stage, name)
        if trained is None:
            targets = None
            if teacher is not None:
                targets = glyph_features(teacher, corpus, views=4, seed=arguments.seed)
            trained = train(
                name,
                corpus,
                captioner,
                images=images,
                learning_rate=rate,
                seed=arguments.seed,
                targets=targets,
            )
            _save_stage(stage, trained)
        export(trained, name, arguments.out)
        teacher = trained.model
        count = sum(p.numel() for p in trained.model.parameters())
        image_count = sum(p.numel() for p in trained.model.visual.parameters())
        facts[name] = {
            "image parameters": image_count,
            "text parameters": count - image_count - trained.model.token_embedding.weight.numel(),
            "tokens": len(trained.token_ids),
            "pictures": images,
            "seconds": trained.seconds,
        }
        results[name] = zero_shot(name, arguments.out, arguments.cache_dir)
        for part in PARTS:
            print(f"{name} zero-shot {part}: {_mean(results[name], part):.1f}", flush=True)
    card = model_card(corpus, results, facts, arguments.out, arguments)
    write_aside(arguments.out / "MODEL_CARD.md", card.encode())


if __name__ == "__main__":
    main()
