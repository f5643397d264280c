"""What the authors' models save and compute, written out here: their attribute names and shapes,
whole sequences of every class through whole blocks, in fp32."""

from __future__ import annotations

import copy
import sys
import types
from collections import OrderedDict

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn
from torch.nn import functional

from tests.clip.vision_support import vision_clip
from tests.conftest import COLOURS
from vlfast.clip.models import wrap_clip

TOKENIZER = SimpleTokenizer()
NAMES = tuple(COLOURS)
WORDS = "a photo of a"


def make_clip(seed=0, name="small", **vision):
    """Towers of 3 and 4 blocks whose widths, 32 and 48, differ; features of 64."""
    torch.manual_seed(seed)
    return wrap_clip(vision_clip(embed_dim=64, width=48, **vision), name=name)


class TextEncoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.transformer = copy.deepcopy(model.transformer)
        self.positional_embedding = copy.deepcopy(model.positional_embedding)
        self.ln_final = copy.deepcopy(model.ln_final)
        self.text_projection = copy.deepcopy(model.text_projection)

    def forward(self, prompts, tokenized, deep=()):
        x = prompts + self.positional_embedding
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        for layer, block in enumerate(self.transformer.resblocks):
            own = getattr(block, "VPT_shallow", None)
            if own is None and 0 < layer <= len(deep):
                own = deep[layer - 1]
            if own is not None:
                rest = x[:, 1 + len(own) :]
                x = torch.cat([x[:, :1], own.expand(len(x), -1, -1), rest], dim=1)
            x = block(x, attn_mask=mask)
        x = self.ln_final(x)
        return x[torch.arange(len(x)), tokenized.argmax(dim=-1)] @ self.text_projection


def encode_images(visual, pixels, first=None, deep=()):
    """By ``visual`` with its own VPT and VPT_shallow, or with the given ones."""
    x = visual.conv1(pixels).flatten(2).permute(0, 2, 1)
    start = visual.class_embedding + torch.zeros(len(x), 1, x.shape[-1])
    x = torch.cat([start, x], dim=1) + visual.positional_embedding
    first = getattr(visual, "VPT", first)
    n = 0 if first is None else len(first)
    if n:
        x = torch.cat([x, first.expand(len(x), -1, -1)], dim=1)
    x = visual.ln_pre(x)
    for layer, block in enumerate(visual.transformer.resblocks):
        own = getattr(block, "VPT_shallow", None)
        if own is None and 0 < layer <= len(deep):
            own = deep[layer - 1]
        if own is not None:
            x = torch.cat([x[:, : x.shape[1] - n], own.expand(len(x), -1, -1)], dim=1)
        x = block(x)
    return visual.ln_post(x[:, 0]) @ visual.proj


class PromptLearner(nn.Module):
    """CoOp's. words: what the sequence is tokenised with; the first n_ctx tokens are replaced."""

    def __init__(self, model, n_ctx, *, csc=False, words=None, position="end"):
        super().__init__()
        d = model.ln_final.weight.shape[0]
        self.ctx = nn.Parameter(torch.randn(*([len(NAMES)] if csc else []), n_ctx, d))
        names = [name.replace("_", " ") for name in NAMES]
        prefix = words or " ".join(["X"] * n_ctx)
        self.name_lens = [len(TOKENIZER.encode(name)) for name in names]
        texts = [f"{prefix} {name}." for name in names]
        length = model.positional_embedding.shape[0]
        self.tokenized = TOKENIZER(texts, context_length=length)
        embedded = model.token_embedding(self.tokenized).detach()
        self.register_buffer("token_prefix", embedded[:, :1])
        self.register_buffer("token_suffix", embedded[:, 1 + n_ctx :])
        self.n_ctx = n_ctx
        self.position = position

    def forward(self, ctx=None):
        ctx = self.ctx if ctx is None else ctx
        ctx = ctx.expand(len(NAMES), -1, -1)
        rows = []
        before = {"end": self.n_ctx, "middle": self.n_ctx // 2, "front": 0}[self.position]
        for i, length in enumerate(self.name_lens):
            name, rest = self.token_suffix[i, :length], self.token_suffix[i, length:]
            rows.append(
                torch.cat([self.token_prefix[i], ctx[i, :before], name, ctx[i, before:], rest])
            )
        return torch.stack(rows)


class Lookalike(nn.Module):
    """``saved`` is what the trainer registers as ``registered``."""

    registered = "prompt_learner"

    def __init__(self, clip):
        super().__init__()
        model = clip.model
        self.image_encoder = copy.deepcopy(model.visual)
        self.text_encoder = TextEncoder(model)
        self.logit_scale = copy.deepcopy(model.logit_scale)

    @property
    def saved(self):
        return self

    def text(self):
        learner = self.prompt_learner
        return self.text_encoder(learner(), learner.tokenized)

    def images(self, pixels):
        return encode_images(self.image_encoder, pixels)

    @torch.no_grad()
    def logits(self, pixels):
        images = functional.normalize(self.images(pixels), dim=-1)
        return self.logit_scale.exp() * images @ functional.normalize(self.text(), dim=-1).T


class CoOp(Lookalike):
    def __init__(self, clip, n_ctx=4, **options):
        super().__init__(clip)
        self.prompt_learner = PromptLearner(clip.model, n_ctx, **options)

    @property
    def saved(self):
        return self.prompt_learner


class KgCoOp(CoOp):
    def __init__(self, clip, **options):
        super().__init__(clip, **options)
        learner = self.prompt_learner
        learner.bias_vectors = nn.Parameter(torch.randn(1, 32))
        learner.meta_net = nn.Sequential(
            OrderedDict([("linear1", nn.Linear(32, 32)), ("relu", nn.ReLU())])
        )


class MoPD(CoOp):
    def __init__(self, clip, prompts=12, **options):
        super().__init__(clip, **options)
        self.prompt_learner.gate = nn.Parameter(torch.randn(64, prompts))


class CoCoOp(CoOp):
    def __init__(self, clip, **options):
        super().__init__(clip, **options)
        layers = [("linear1", nn.Linear(64, 4)), ("relu", nn.ReLU()), ("linear2", nn.Linear(4, 32))]
        self.prompt_learner.meta_net = nn.Sequential(OrderedDict(layers))

    @torch.no_grad()
    def logits(self, pixels):
        rows = []
        learner = self.prompt_learner
        for image in functional.normalize(self.images(pixels), dim=-1):
            moved = learner.ctx + learner.meta_net(image[None])
            text = self.text_encoder(learner(moved), learner.tokenized)
            rows.append(self.logit_scale.exp() * functional.normalize(text, dim=-1) @ image)
        return torch.stack(rows)


def add_visual(visual, n, depth):
    visual.VPT = nn.Parameter(torch.randn(n, 48))
    for block in visual.transformer.resblocks[1:depth]:
        block.VPT_shallow = nn.Parameter(torch.randn(n, 48))


class VPT(Lookalike):
    def __init__(self, clip, n=3, depth=4):
        super().__init__(clip)
        add_visual(self.image_encoder, n, depth)
        self.fixed = [PromptLearner(clip.model, 1, words=WORDS)]  # in a list: not saved
        self.embedding = [clip.model.token_embedding]

    def text(self):
        tokenized = self.fixed[0].tokenized
        return self.text_encoder(self.embedding[0](tokenized), tokenized)


class IVLP(Lookalike):
    registered = "VLPromptLearner"

    def __init__(self, clip, n_ctx=2, depth=3, n_visual=3, visual_depth=4, words=WORDS):
        super().__init__(clip)
        if n_visual:
            add_visual(self.image_encoder, n_visual, visual_depth)
        for block in self.text_encoder.transformer.resblocks[1:depth]:
            block.VPT_shallow = nn.Parameter(torch.randn(n_ctx, 32))
        self.prompt_learner = PromptLearner(clip.model, n_ctx, words=words)


class PromptSRC(IVLP):
    def __init__(self, clip, n_ctx=4, **options):
        super().__init__(clip, n_ctx=n_ctx, **options)
        self.prompt_learner.ZS_image_encoder = copy.deepcopy(clip.model.visual)


class MaPLe(Lookalike):
    registered = "MultiModalPromptLearner"

    def __init__(self, clip, n_ctx=2, depth=3, words=WORDS):
        super().__init__(clip)
        learner = PromptLearner(clip.model, n_ctx, words=words)
        learner.proj = nn.Linear(32, 48)
        learner.compound_prompts_text = nn.ParameterList(
            nn.Parameter(torch.randn(n_ctx, 32)) for _ in range(depth - 1)
        )
        learner.compound_prompt_projections = nn.ModuleList(
            nn.Linear(32, 48) for _ in range(depth - 1)
        )
        self.prompt_learner = learner

    def text(self):
        learner = self.prompt_learner
        return self.text_encoder(learner(), learner.tokenized, learner.compound_prompts_text)

    def images(self, pixels):
        learner = self.prompt_learner
        pairs = zip(learner.compound_prompt_projections, learner.compound_prompts_text, strict=True)
        deep = [project(prompt) for project, prompt in pairs]
        return encode_images(self.image_encoder, pixels, learner.proj(learner.ctx), deep)


class PromptKD(nn.Module):
    """Saves no text encoder; class features [C, 40] come from the teacher."""

    registered = "VLPromptLearner"

    def __init__(self, clip, features, n=4, depth=3):
        super().__init__()
        self.image_encoder = copy.deepcopy(clip.model.visual)
        add_visual(self.image_encoder, n, depth)
        self.logit_scale = copy.deepcopy(clip.model.logit_scale)
        out = features.shape[1]
        self.VPT_image_trans = nn.Module()
        self.VPT_image_trans.conv1 = nn.Sequential(
            nn.Conv2d(64, out, 1), nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 1)
        )
        norm = self.VPT_image_trans.conv1[1]
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
            tensor += 0.3 * torch.randn(out)
        norm.running_var *= 1 + torch.rand(out)
        self.features = [features]
        self.eval()

    @property
    def saved(self):
        return self

    @torch.no_grad()
    def logits(self, pixels):
        images = encode_images(self.image_encoder, pixels)
        images = self.VPT_image_trans.conv1(images[:, :, None, None]).flatten(1)
        images = functional.normalize(images, dim=-1)
        return self.logit_scale.exp() * images @ functional.normalize(self.features[0], dim=-1).T


def save(model, folder, *, epoch=5, half=False, legacy=False, change=None):
    """As Dassl's trainer does: with the optimizer's state and a scheduler's, which holds another
    scheduler, which holds the optimizer. Its module is gone when the file is read."""
    state = OrderedDict((k, v.clone()) for k, v in model.saved.state_dict().items())
    if half:
        state = OrderedDict((k, v.half() if v.is_floating_point() else v) for k, v in state.items())
    if change is not None:
        change(state)
    optimizer, scheduler = training_state(model.saved)
    file = folder / model.registered / f"model.pth.tar-{epoch}"
    file.parent.mkdir(parents=True, exist_ok=True)
    held = {
        "state_dict": state,
        "epoch": epoch,
        "optimizer": optimizer.state_dict(),
        "scheduler": {k: v for k, v in vars(scheduler).items() if k != "optimizer"},
        "val_result": None,
    }
    with dassl_is_there(type(scheduler)):
        torch.save(held, file, _use_new_zipfile_serialization=not legacy)
    (file.parent / "checkpoint").write_text(f"{file.name}\n")
    return file


class ConstantWarmupScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Holds the scheduler that comes after it."""

    def __init__(self, optimizer, successor, warmup_epoch, cons_lr):
        self.successor, self.warmup_epoch, self.cons_lr = successor, warmup_epoch, cons_lr
        super().__init__(optimizer)

    def get_lr(self):
        return [self.cons_lr for _ in self.base_lrs]


ConstantWarmupScheduler.__module__ = "dassl.optim.lr_scheduler"


def training_state(module):
    parameters = [nn.Parameter(p.detach().clone()) for p in list(module.parameters())[:3]]
    optimizer = torch.optim.SGD(parameters, lr=0.002, momentum=0.9, weight_decay=5e-4)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50.0)
    inner = ConstantWarmupScheduler(optimizer, cosine, 1, 1e-5)
    return optimizer, ConstantWarmupScheduler(optimizer, inner, 1, 1e-5)


class dassl_is_there:
    """As long as something is pickled."""

    def __init__(self, scheduler):
        modules = {
            name: types.ModuleType(name)
            for name in ("dassl", "dassl.optim", "dassl.optim.lr_scheduler")
        }
        modules["dassl.optim.lr_scheduler"].ConstantWarmupScheduler = scheduler
        self.modules = modules

    def __enter__(self):
        sys.modules.update(self.modules)

    def __exit__(self, *error):
        for name in self.modules:
            del sys.modules[name]
