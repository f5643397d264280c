"""Small look-alikes of what CoOp-family codebases hold: the same attribute names, the same calls,
around a small CLIP in the layouts of openai/CLIP and of open_clip.

``build("maple")`` gives a model with its trainer's step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.dropin.lookalike_clip import (
    Clip,
    Design,
    Sizes,
    convert_weights,
    rounded_forward,
)

SMALL = Sizes()
# Tokens of a class's name, one class after the other.
NAME_LENGTHS = (2, 1, 4, 1, 3, 2, 6, 1, 2)


@dataclass
class Outcome:
    """Of a step or of evaluation; gradients by parameter name, without those that have none."""

    logits: Tensor | None
    loss: Tensor | None
    gradients: dict[str, Tensor]


@dataclass
class Built:
    """A codebase's trainer, as far as a step needs it.

    model: what trains. target: what ``accelerate`` is given, the model itself but for PromptKD,
    whose class names stand in its teacher. compute: (images, labels) -> (logits or None, losses);
    of two losses the second guides the first (ProGrad). beside: a frozen model that helps.
    """

    model: nn.Module
    target: nn.Module
    compute: Callable[[Tensor, Tensor], tuple[Tensor | None, Sequence[Tensor]]]
    infer: Callable[[Tensor], Tensor]
    images: Tensor
    labels: Tensor
    whole_trains: bool = False  # whether train() is called on all of the model
    beside: nn.Module | None = None

    def learnable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def train(self, mode: bool = True) -> None:
        part = self.model if self.whole_trains else self.model.prompt_learner
        part.train(mode)

    def step(self) -> Outcome:
        """Forward and backward; the gradients stay on the parameters, too."""
        self.train()
        self.model.zero_grad()
        logits, losses = self.compute(self.images, self.labels)
        if len(losses) == 1:
            losses[0].backward()
        else:
            self._guided_backward(*losses)
        found = {n: p.grad.clone() for n, p in self.learnable().items() if p.grad is not None}
        return Outcome(None if logits is None else logits.detach(), losses[0].detach(), found)

    def evaluate(self) -> Tensor:
        self.train(False)
        with torch.no_grad():
            return self.infer(self.images)

    def optimizer(self, lr: float = 0.05) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.learnable().values(), lr=lr, momentum=0.9)

    def _guided_backward(self, own: Tensor, guide: Tensor) -> None:
        """[ProGrad]: what of the own gradient points against the guide's is taken away."""
        leaves = [p for p in self.model.prompt_learner.parameters() if p.requires_grad]
        guide.backward(retain_graph=True)
        guides = [p.grad.clone() for p in leaves]
        self.model.zero_grad()
        own.backward()
        for leaf, direction in zip(leaves, guides, strict=True):
            unit = direction / direction.norm()
            along = (leaf.grad * unit).sum()
            if along < 0:
                leaf.grad = leaf.grad - along * unit


def build(
    family: str,
    *,
    layout: str = "openai",
    classes: int | Sequence[Sequence[int]] = 7,
    dtype: torch.dtype = torch.float32,
    sizes: Sizes = SMALL,
    images: int = 3,
    seed: int = 1,
    rounded_backward: bool = True,
    **options: Any,
) -> Built:
    """A look-alike of one of FAMILIES.

    classes: how many, or the tokens of each name. dtype: torch.float16 as openai/CLIP's weights
    come, or another that all is cast to. rounded_backward: whether gradients of deep prompts are
    rounded where the codebases' are, class by class. options: n_ctx; for CoOp and KDPL's also
    position, class_specific; for those with deep prompts depth.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        setting = Setting(layout, _names(classes, sizes), dtype, sizes, rounded_backward, options)
        built = FAMILIES[family](setting)
        size = sizes.image
        built.images = torch.randn(images, 3, size, size)
        built.labels = torch.randint(len(setting.names), (images,))
    return built


@dataclass
class Setting:
    layout: str
    names: list[list[int]]
    dtype: torch.dtype
    sizes: Sizes
    rounded_backward: bool
    options: dict[str, Any]

    def option(self, name: str, default: Any) -> Any:
        return self.options.get(name, default)

    def clip(self, design: Design | None = None) -> Clip:
        """A CLIP of this setting, all of it frozen but the prompts in it."""
        model = Clip(self.layout, self.sizes, design or Design()).eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("VPT" in name)
        if self.dtype == torch.float16:
            convert_weights(model)
            return model
        return model.to(self.dtype)

    @property
    def rounding(self) -> Callable[[Tensor], Tensor]:
        # A concatenation with what is fp32 or fp64 brings the dtype back.
        return Tensor.half if self.rounded_backward else rounded_forward

    def deep(self, kind: str, *, n: int = 2) -> Design:
        depth = self.option("depth", self.sizes.layers)
        return Design(kind, depth, self.option("n_ctx", n), depth, 2, self.rounding)


def _names(classes: int | Sequence[Sequence[int]], sizes: Sizes) -> list[list[int]]:
    if not isinstance(classes, int):
        return [list(name) for name in classes]
    lengths = [NAME_LENGTHS[i % len(NAME_LENGTHS)] for i in range(classes)]
    return [torch.randint(8, sizes.vocabulary - 2, (n,)).tolist() for n in lengths]


PERIOD, WORDS = 1, (2, 3, 4, 2)  # "a photo of a"


def tokenize(names: Sequence[Sequence[int]], before: Sequence[int], sizes: Sizes) -> Tensor:
    """int64 [C, L]: SOS, what stands before the name, the name, a period, EOT, zeros."""
    tokens = torch.zeros(len(names), sizes.length, dtype=torch.int64)
    for row, name in zip(tokens, names, strict=True):
        ids = [sizes.vocabulary - 2, *before, *name, PERIOD, sizes.vocabulary - 1]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


class TextEncoder(nn.Module):
    def __init__(self, clip_model: Clip) -> None:
        super().__init__()
        self.transformer = clip_model.transformer
        self.positional_embedding = clip_model.positional_embedding
        self.ln_final = clip_model.ln_final
        self.text_projection = clip_model.text_projection
        self.dtype = clip_model.dtype

    def forward(self, prompts: Tensor, tokenized_prompts: Tensor) -> Tensor:
        x = prompts + self.positional_embedding.type(self.dtype)
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        return self.read(x, tokenized_prompts)

    def read(self, x: Tensor, tokenized_prompts: Tensor) -> Tensor:
        x = self.ln_final(x).type(self.dtype)
        return x[torch.arange(len(x)), tokenized_prompts.argmax(dim=-1)] @ self.text_projection


class MapleTextEncoder(TextEncoder):
    def forward(
        self, prompts: Tensor, tokenized_prompts: Tensor, compound_prompts_deeper_text: Any
    ) -> Tensor:
        x = prompts + self.positional_embedding.type(self.dtype)
        outputs = self.transformer([x.permute(1, 0, 2), compound_prompts_deeper_text, 0])
        return self.read(outputs[0].permute(1, 0, 2), tokenized_prompts)


class OpenClipTextEncoder(TextEncoder):
    def __init__(self, clip_model: Clip) -> None:
        super().__init__(clip_model)
        self.attn_mask = clip_model.attn_mask

    def forward(self, prompts: Tensor, tokenized_prompts: Tensor) -> Tensor:
        x = prompts + self.positional_embedding.type(self.dtype)
        return self.read(self.transformer(x, attn_mask=self.attn_mask), tokenized_prompts)


class OpenClipMapleTextEncoder(OpenClipTextEncoder):
    def forward(
        self, prompts: Tensor, tokenized_prompts: Tensor, compound_prompts_deeper_text: Any
    ) -> Tensor:
        x = prompts + self.positional_embedding.type(self.dtype)
        inputs = [x, compound_prompts_deeper_text, 0]
        outputs = self.transformer(inputs, attn_mask=self.attn_mask)
        return self.read(outputs[0], tokenized_prompts)


TEXT_ENCODERS = {
    "openai": (TextEncoder, MapleTextEncoder),
    "open_clip": (OpenClipTextEncoder, OpenClipMapleTextEncoder),
}


class PromptLearner(nn.Module):
    """CoOp's: random context, one for all or one a class, behind, around or before the name."""

    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__()
        n, names = setting.option("n_ctx", 4), setting.names
        shape = [n, setting.sizes.width]
        if setting.option("class_specific", False):
            shape.insert(0, len(names))
        self.ctx = nn.Parameter((0.2 * torch.randn(shape)).type(clip_model.dtype))
        self.lay_out(setting, clip_model, [5] * n)
        self.class_token_position = setting.option("position", "end")

    def lay_out(self, setting: Setting, clip_model: Clip, before: Sequence[int]) -> None:
        """before: tokens in front of the name; the context stands for the first of them."""
        n = self.ctx.shape[-2]
        self.tokenized_prompts = tokenize(setting.names, before, setting.sizes)
        with torch.no_grad():
            embedding = clip_model.token_embedding(self.tokenized_prompts).type(clip_model.dtype)
        self.register_buffer("token_prefix", embedding[:, :1, :])
        self.register_buffer("token_suffix", embedding[:, 1 + n :, :])
        self.n_cls = len(setting.names)
        self.n_ctx = n
        self.name_lens = [len(name) for name in setting.names]

    def forward(self) -> Any:
        ctx = self.ctx
        if ctx.dim() == 2:
            ctx = ctx.unsqueeze(0).expand(self.n_cls, -1, -1)
        position = getattr(self, "class_token_position", "end")
        if position == "end":
            return self.construct_prompts(ctx, self.token_prefix, self.token_suffix)
        before = self.n_ctx // 2 if position == "middle" else 0
        prompts = []
        for i, length in enumerate(self.name_lens):
            sos, rest, own = self.token_prefix[i], self.token_suffix[i], ctx[i]
            parts = [sos, own[:before], rest[:length], own[before:], rest[length:]]
            prompts.append(torch.cat(parts))
        return torch.stack(prompts)

    def construct_prompts(self, ctx: Tensor, prefix: Tensor, suffix: Tensor) -> Tensor:
        return torch.cat([prefix, ctx, suffix], dim=1)


class CustomCLIP(nn.Module):
    def __init__(self, setting: Setting, clip_model: Clip, learner: Any = PromptLearner) -> None:
        super().__init__()
        self.prompt_learner = learner(setting, clip_model)
        self.tokenized_prompts = self.prompt_learner.tokenized_prompts
        self.image_encoder = clip_model.visual
        self.text_encoder = TEXT_ENCODERS[setting.layout][0](clip_model)
        self.logit_scale = clip_model.logit_scale
        self.dtype = clip_model.dtype

    def encode_image(self, image: Tensor, *deep: Any) -> Tensor:
        return F.normalize(self.image_encoder(image.type(self.dtype), *deep), dim=-1)

    def compare(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        return self.logit_scale.exp() * image_features @ text_features.t()

    def forward(self, image: Tensor) -> Any:
        image_features = self.encode_image(image)
        text_features = self.text_encoder(self.prompt_learner(), self.tokenized_prompts)
        return self.compare(image_features, F.normalize(text_features, dim=-1))


class WordsLearner(PromptLearner):
    """The first n of the words "a photo of a"; the others of them stay before the name."""

    def __init__(self, setting: Setting, clip_model: Clip, n: int = 2) -> None:
        nn.Module.__init__(self)
        n = setting.option("n_ctx", n)
        words = [*WORDS, *[5] * n][: max(n, len(WORDS))]
        with torch.no_grad():
            embedding = clip_model.token_embedding(torch.tensor(words)).type(clip_model.dtype)
        self.ctx = nn.Parameter(embedding[:n].clone())
        self.lay_out(setting, clip_model, words)


class CocoopLearner(WordsLearner):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model, n=4)
        joint, width = setting.sizes.joint, setting.sizes.width
        self.meta_net = nn.Sequential()
        self.meta_net.add_module("linear1", nn.Linear(joint, joint // 4))
        self.meta_net.add_module("relu", nn.ReLU(inplace=True))
        self.meta_net.add_module("linear2", nn.Linear(joint // 4, width))
        self.meta_net.to(clip_model.dtype)

    def forward(self, im_features: Tensor) -> Tensor:
        shifted = self.ctx.unsqueeze(0) + self.meta_net(im_features).unsqueeze(1)
        prompts = []
        for context in shifted:
            context = context.unsqueeze(0).expand(self.n_cls, -1, -1)
            prompts.append(self.construct_prompts(context, self.token_prefix, self.token_suffix))
        return torch.stack(prompts)


class Cocoop(CustomCLIP):
    def __init__(self, setting: Setting, clip_model: Clip, learner: Any = CocoopLearner) -> None:
        super().__init__(setting, clip_model, learner)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        image_features = self.encode_image(image)
        logits = self.one_by_one(
            self.prompt_learner(image_features), image_features, self.tokenized_prompts
        )
        if self.prompt_learner.training:
            return F.cross_entropy(logits, label)
        return logits

    def one_by_one(self, prompts: Any, image_features: Tensor, tokenized: Tensor) -> Tensor:
        logits = []
        for its_prompts, its_features in zip(prompts, image_features, strict=True):
            text_features = self.text_encoder(its_prompts, tokenized)
            logits.append(self.compare(its_features, F.normalize(text_features, dim=-1)))
        return torch.stack(logits)


class KgcoopLearner(WordsLearner):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model, n=4)
        self.class_token_position = "end"
        width = setting.sizes.width
        self.bias_vectors = nn.Parameter(torch.randn(1, width).type(clip_model.dtype))
        self.meta_net = nn.Sequential()
        self.meta_net.add_module("linear1", nn.Linear(width, width))
        self.meta_net.add_module("relu", nn.ReLU(inplace=True))
        tokens = tokenize(setting.names, WORDS[:3], setting.sizes)
        with torch.no_grad():
            self.text_features = F.normalize(clip_model.encode_text(tokens), dim=-1)


class Kgcoop(CustomCLIP):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model, KgcoopLearner)
        self.ori_embedding = self.prompt_learner.text_features
        self.meta_net = self.prompt_learner.meta_net
        width = setting.sizes.width
        self.adapter = nn.Sequential(nn.Linear(width, width // 4, bias=False), nn.ReLU())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("ctx" in name)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        text_features = self.text_encoder(self.prompt_learner(), self.tokenized_prompts)
        text_features = F.normalize(text_features, dim=-1)
        cosines = F.cosine_similarity(text_features, self.ori_embedding, dim=1, eps=1e-7)
        return self.compare(self.encode_image(image), text_features), 1.0 - cosines.mean()


class ZeroShot(nn.Module):
    """ProGrad's second, frozen CLIP."""

    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__()
        self.clip_model = copy.deepcopy(clip_model).float()
        with torch.no_grad():
            tokens = tokenize(setting.names, WORDS, setting.sizes)
            self.text_features = F.normalize(self.clip_model.encode_text(tokens), dim=-1)

    def forward(self, image: Tensor) -> Tensor:
        features = F.normalize(self.clip_model.encode_image(image), dim=-1)
        return self.clip_model.logit_scale.exp() * features @ self.text_features.t()


class FixedEmbeddings:
    """VPT's class features, in no module."""

    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        with torch.no_grad():
            tokens = tokenize(setting.names, WORDS, setting.sizes)
            self.fixed_embeddings = clip_model.encode_text(tokens)

    def return_fixed_embeddings(self) -> Tensor:
        return self.fixed_embeddings


class Vpt(nn.Module):
    """It has a text encoder, and never calls it."""

    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__()
        self.embeddings = FixedEmbeddings(setting, clip_model)
        self.image_encoder = clip_model.visual
        self.text_encoder = TEXT_ENCODERS[setting.layout][0](clip_model)
        self.logit_scale = clip_model.logit_scale
        self.dtype = clip_model.dtype

    def forward(self, image: Tensor, label: Tensor | None = None, training: bool = False) -> Tensor:
        text_features = F.normalize(self.embeddings.return_fixed_embeddings(), dim=-1)
        image_features = F.normalize(self.image_encoder(image.type(self.dtype)), dim=-1)
        logits = self.logit_scale.exp() * image_features @ text_features.t()
        return F.cross_entropy(logits, label) if training else logits


class Ivlp(CustomCLIP):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model, WordsLearner)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        logits = super().forward(image)
        return F.cross_entropy(logits, label) if self.prompt_learner.training else logits


class PromptsrcLearner(WordsLearner):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model)
        plain = setting.clip()
        self.ZS_image_encoder = plain.visual
        features = []
        with torch.no_grad():
            for template in ((3, 4), (2,), (6, 7, 2)):
                features.append(plain.encode_text(tokenize(setting.names, template, setting.sizes)))
        self.fixed_embeddings = torch.stack(features).mean(dim=0)


class Promptsrc(CustomCLIP):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model, PromptsrcLearner)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Any:
        text_features = self.text_encoder(self.prompt_learner(), self.tokenized_prompts)
        text_features = F.normalize(text_features, dim=-1)
        image_features = self.encode_image(image)
        logits = self.compare(image_features, text_features)
        if not self.prompt_learner.training:
            return logits
        fixed = F.normalize(self.prompt_learner.fixed_embeddings, dim=-1)
        with torch.no_grad():
            frozen = self.prompt_learner.ZS_image_encoder(image.type(self.dtype))
            frozen = F.normalize(frozen, dim=-1)
            frozen_logits = self.compare(frozen, fixed)
        loss = F.cross_entropy(logits, label)
        return loss, text_features, fixed, frozen, image_features, frozen_logits, logits


class MultiModalPromptLearner(WordsLearner):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model)
        width, deeper = setting.sizes.width, setting.option("depth", setting.sizes.layers) - 1
        layer = nn.Linear(width, setting.sizes.vision_width)
        self.proj = copy.deepcopy(layer).type(clip_model.dtype)
        self.compound_prompts_depth = deeper + 1
        # These stay in fp32 beside weights of fp16.
        dtype = torch.float32 if clip_model.dtype == torch.float16 else clip_model.dtype
        self.compound_prompts_text = nn.ParameterList(
            nn.Parameter(0.2 * torch.randn(self.n_ctx, width).to(dtype)) for _ in range(deeper)
        )
        self.compound_prompt_projections = nn.ModuleList(
            copy.deepcopy(layer).to(dtype) for _ in range(deeper)
        )

    def forward(self) -> tuple[Tensor, Tensor, nn.ParameterList, list[Tensor]]:
        pairs = zip(self.compound_prompt_projections, self.compound_prompts_text, strict=True)
        visual = [layer(prompt) for layer, prompt in pairs]
        return super().forward(), self.proj(self.ctx), self.compound_prompts_text, visual


class Maple(CustomCLIP):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model, MultiModalPromptLearner)
        self.text_encoder = TEXT_ENCODERS[setting.layout][1](clip_model)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        prompts, shared_ctx, deep_text, deep_vision = self.prompt_learner()
        text_features = self.text_encoder(prompts, self.tokenized_prompts, deep_text)
        image_features = self.encode_image(image, shared_ctx, deep_vision)
        logits = self.compare(image_features, F.normalize(text_features, dim=-1))
        return F.cross_entropy(logits, label) if self.prompt_learner.training else logits


class KdplCoopLearner(PromptLearner):
    def forward(self, prompts_indices: Any = None) -> Tensor:
        prompts = super().forward()
        return prompts if prompts_indices is None else prompts[prompts_indices]


class KdplCoop(CustomCLIP):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model)
        self.prompt_learner = KdplCoopLearner(setting, clip_model)

    def forward(self, image: Tensor, prompts_indices: Any = None) -> Tensor:
        tokenized = self.tokenized_prompts
        if prompts_indices is not None:
            tokenized = tokenized[prompts_indices]
        text_features = self.text_encoder(self.prompt_learner(prompts_indices), tokenized)
        return self.compare(self.encode_image(image), F.normalize(text_features, dim=-1))


class KdplCocoopLearner(CocoopLearner):
    def forward(self, im_features: Tensor, prompts_indices: Any = None) -> Tensor:
        prompts = super().forward(im_features)
        if prompts_indices is not None:
            index = torch.from_numpy(prompts_indices).to(prompts.device)
            prompts = torch.index_select(prompts, dim=1, index=index)
        return prompts


class KdplCocoop(Cocoop):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model)
        self.prompt_learner = KdplCocoopLearner(setting, clip_model)

    def forward(self, image: Tensor, prompts_indices: Any = None) -> Tensor:
        tokenized = self.tokenized_prompts
        if prompts_indices is not None:
            tokenized = tokenized[prompts_indices]
        image_features = self.encode_image(image)
        prompts = self.prompt_learner(image_features, prompts_indices)
        return self.one_by_one(prompts, image_features, tokenized)


class TeacherTextEncoder(nn.Module):
    """KDPL's: it has a text encoder's parts, and hands the tokens to its CLIP."""

    def __init__(self, clip_model: Clip) -> None:
        super().__init__()
        self.clip_model = clip_model
        self.transformer = clip_model.transformer
        self.positional_embedding = clip_model.positional_embedding
        self.ln_final = clip_model.ln_final
        self.text_projection = clip_model.text_projection

    @torch.no_grad()
    def forward(self, prompts: Tensor, tokenized_prompts: Tensor, batch_size: int = 4) -> Tensor:
        parts = tokenized_prompts.split(batch_size)
        return torch.cat([self.clip_model.encode_text(part) for part in parts])


class TeacherPrompt(nn.Module):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__()
        self.tokenized_prompts = tokenize(setting.names, WORDS, setting.sizes)
        with torch.no_grad():
            embedding = clip_model.token_embedding(self.tokenized_prompts).type(clip_model.dtype)
        self.register_buffer("token_prefix", embedding[:, :1, :])
        self.register_buffer("embedding", embedding)

    def forward(self) -> Tensor:
        return self.embedding


class CustomCLIPTeacher(nn.Module):
    def __init__(self, setting: Setting, clip_model: Clip, student_logit_scale: Any) -> None:
        super().__init__()
        self.prompt_learner = TeacherPrompt(setting, clip_model)
        self.tokenized_prompts = self.prompt_learner.tokenized_prompts
        self.image_encoder = clip_model.visual
        self.text_encoder = TeacherTextEncoder(clip_model)
        self.logit_scale = student_logit_scale
        self.dtype = clip_model.dtype

    def init_teacher_text_features(self) -> None:
        with torch.no_grad():
            features = self.text_encoder(self.prompt_learner(), self.tokenized_prompts)
            self.teacher_text_features = features

    def forward(self, image: Tensor) -> Tensor:
        image_features = F.normalize(self.image_encoder(image.type(self.dtype)), dim=-1)
        text_features = F.normalize(self.teacher_text_features, dim=-1)
        return self.logit_scale.exp() * image_features @ text_features.t()


class MopdLearner(WordsLearner):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model, n=4)
        self.class_token_position = "end"
        features = []
        with torch.no_grad():
            for template in ((3, 4), (2,), (6, 7, 2), (5,)):
                tokens = tokenize(setting.names, template, setting.sizes)
                features.append(F.normalize(clip_model.encode_text(tokens), dim=-1))
        self.all_hard_prompt_fea = torch.stack(features)
        gate = 0.1 * torch.randn(setting.sizes.joint, len(features))
        self.gate = nn.Parameter(gate.type(clip_model.dtype))

    def forward(self) -> tuple[Tensor, Tensor]:
        return super().forward(), self.gate


class Mopd(CustomCLIP):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model, MopdLearner)
        self.ori_embedding = self.prompt_learner.all_hard_prompt_fea
        self.T = 1.0
        self.num_prompts = 2

    def forward(self, image: Tensor) -> tuple[Any, ...]:
        prompts, gate = self.prompt_learner()
        image_features = self.encode_image(image)
        text_features = self.text_encoder(prompts, self.tokenized_prompts)
        logits = self.compare(image_features, F.normalize(text_features, dim=-1))
        values, top_index = (image_features @ gate).topk(self.num_prompts, dim=1)
        weights = F.softmax(values, dim=1)
        teachers = self.logit_scale.exp() * image_features @ self.ori_embedding.transpose(1, 2)
        teachers = teachers.transpose(0, 1)
        rows = torch.arange(len(image))
        distillation = 0
        for i in range(self.num_prompts):
            its = F.softmax(teachers[rows, top_index[:, i]] / self.T, dim=-1)
            loss = F.kl_div(F.log_softmax(logits / self.T, dim=1), its, reduction="none").sum(1)
            distillation += (weights[:, i] * loss).sum() * self.T**2 / len(image)
        return logits, distillation, teachers, weights, top_index, rows

    def inference(self, image: Tensor) -> Tensor:
        prompts, _ = self.prompt_learner()
        text_features = self.text_encoder(prompts, self.tokenized_prompts)
        return self.compare(self.encode_image(image), F.normalize(text_features, dim=-1))


class PromptkdLearner(WordsLearner):
    """Base and new classes in buffers of their own."""

    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model)
        half = (self.n_cls + 1) // 2
        prefix, suffix = self.token_prefix, self.token_suffix
        self.register_buffer("token_prefix", prefix[:half])
        self.register_buffer("token_suffix", suffix[:half])
        self.register_buffer("token_prefix2", prefix[half:])
        self.register_buffer("token_suffix2", suffix[half:])

    def forward(self) -> Tensor:
        ctx = self.ctx.unsqueeze(0).expand(self.n_cls, -1, -1)
        prefix = torch.cat([self.token_prefix, self.token_prefix2])
        suffix = torch.cat([self.token_suffix, self.token_suffix2])
        return self.construct_prompts(ctx, prefix, suffix)


class PromptkdTeacher(CustomCLIP):
    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__(setting, clip_model, PromptkdLearner)

    def forward(self, image: Tensor, label: Tensor | None = None) -> tuple[Tensor, ...]:
        text_features = self.text_encoder(self.prompt_learner(), self.tokenized_prompts)
        text_features = F.normalize(text_features, dim=-1)
        image_features = self.encode_image(image)
        return image_features, text_features, self.compare(image_features, text_features)


class PromptkdStudent(nn.Module):
    """Without a text side."""

    def __init__(self, setting: Setting, clip_model: Clip) -> None:
        super().__init__()
        joint = setting.sizes.joint
        self.image_encoder = clip_model.visual
        self.logit_scale = clip_model.logit_scale
        self.dtype = clip_model.dtype
        self.n_cls = len(setting.names)
        self.VPT_image_trans = nn.Sequential(
            nn.Linear(joint, joint), nn.ReLU(inplace=True), nn.Linear(joint, joint)
        ).to(clip_model.dtype)

    def forward(self, image: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features = self.VPT_image_trans(self.image_encoder(image.type(self.dtype)))
        return F.normalize(features, dim=-1), self.logit_scale.exp()


def _built(model: nn.Module, compute: Any, infer: Any = None, **rest: Any) -> Built:
    empty = torch.empty(0)
    target = rest.pop("target", model)
    return Built(model, target, compute, infer or model, empty, empty, **rest)


def _coop(setting: Setting) -> Built:
    model = CustomCLIP(setting, setting.clip())

    def compute(images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits = model(images)
        return logits, [F.cross_entropy(logits, labels)]

    return _built(model, compute)


def _prograd(setting: Setting) -> Built:
    clip_model = setting.clip()
    model, zero_shot = CustomCLIP(setting, clip_model), ZeroShot(setting, clip_model)

    def compute(images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits = model(images)
        with torch.no_grad():
            its = zero_shot(images.type(zero_shot.clip_model.dtype)).type(logits.dtype)
        guide = -(F.softmax(its, dim=-1) * F.log_softmax(logits, dim=-1)).sum(1).mean()
        return logits, [F.cross_entropy(logits, labels), guide]

    return _built(model, compute, beside=zero_shot)


def _kgcoop(setting: Setting) -> Built:
    model = Kgcoop(setting, setting.clip())

    def compute(images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, score = model(images)
        return logits, [F.cross_entropy(logits, labels) + 8.0 * score]

    return _built(model, compute, lambda images: model(images)[0])


def _labelled(model: nn.Module, *, whole_trains: bool) -> Built:
    """In training its forward returns the loss."""

    def compute(images: Tensor, labels: Tensor) -> tuple[None, list[Tensor]]:
        return None, [model(images, labels)]

    return _built(model, compute, whole_trains=whole_trains)


def _cocoop(setting: Setting) -> Built:
    return _labelled(Cocoop(setting, setting.clip()), whole_trains=False)


def _ivlp(setting: Setting) -> Built:
    return _labelled(Ivlp(setting, setting.clip(setting.deep("IVLP"))), whole_trains=True)


def _maple(setting: Setting) -> Built:
    return _labelled(Maple(setting, setting.clip(setting.deep("MaPLe"))), whole_trains=True)


def _vpt(setting: Setting) -> Built:
    depth = setting.option("depth", setting.sizes.vision_layers)
    design = Design("IVLP", 0, 0, depth, setting.option("n_ctx", 4), setting.rounding)
    model = Vpt(setting, setting.clip(design))

    def compute(images: Tensor, labels: Tensor) -> tuple[None, list[Tensor]]:
        return None, [model(images, labels, training=True)]

    return _built(model, compute, whole_trains=True)


def _promptsrc(setting: Setting) -> Built:
    model = Promptsrc(setting, setting.clip(setting.deep("IVLP")))
    model.prompt_learner.ZS_image_encoder.requires_grad_(False)

    def compute(images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        loss, text, fixed, frozen, own, frozen_logits, logits = model(images, labels)
        loss = loss + 25 * F.l1_loss(text, fixed) + 10 * F.l1_loss(own, frozen)
        both = F.log_softmax(logits, dim=1), F.log_softmax(frozen_logits, dim=1)
        guide = F.kl_div(*both, reduction="sum", log_target=True) / logits.numel()
        return logits, [loss + guide]

    return _built(model, compute, whole_trains=True)


def _kdpl(student: type[nn.Module]) -> Callable[[Setting], Built]:
    def make(setting: Setting) -> Built:
        model = student(setting, setting.clip())
        teacher = CustomCLIPTeacher(setting, setting.clip(), model.logit_scale)
        teacher.init_teacher_text_features()
        kept = setting.option("kept", len(setting.names))

        def compute(images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
            its = teacher(images)
            mean = F.softmax(its.detach(), dim=1).numpy().mean(axis=0)
            chosen = np.argpartition(mean, -kept)[-kept:]
            logits = model(images, chosen)
            its, own = F.log_softmax(its[:, chosen], dim=-1), F.log_softmax(logits, dim=-1)
            forward = F.kl_div(own, its, log_target=True, reduction="batchmean")
            reverse = F.kl_div(its, own, log_target=True, reduction="batchmean")
            return logits, [0.5 * forward + 0.5 * reverse]

        return _built(model, compute, beside=teacher)

    return make


def _mopd(setting: Setting) -> Built:
    model = Mopd(setting, setting.clip())

    def compute(images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, distillation, teachers, weights, top_index, rows = model(images)
        loss = 0.8 * F.cross_entropy(logits, labels) + 0.2 * distillation
        for i in range(model.num_prompts):
            its = F.cross_entropy(teachers[rows, top_index[:, i]], labels, reduction="none")
            loss = loss + 0.1 * (weights[:, i] * its).sum() / len(rows)
        return logits, [loss]

    return _built(model, compute, model.inference)


def _promptkd(setting: Setting) -> Built:
    teacher = PromptkdTeacher(setting, setting.clip(setting.deep("IVLP"))).eval()
    depth = setting.option("depth", setting.sizes.vision_layers)
    design = Design("IVLP", 0, 0, depth, 2, setting.rounding)
    model = PromptkdStudent(setting, setting.clip(design))

    def infer(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            _, classes, its = teacher(images)
        features, scale = model(images)
        return scale * features @ classes.t().detach(), its

    def compute(images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits, its = infer(images)
        both = F.log_softmax(logits, dim=1), F.softmax(its, dim=1)
        return logits, [1000.0 * F.kl_div(*both, reduction="sum") / logits.numel()]

    return _built(
        model, compute, lambda images: infer(images)[0], target=teacher, whole_trains=True
    )


FAMILIES: dict[str, Callable[[Setting], Built]] = {
    "coop": _coop,
    "cocoop": _cocoop,
    "kgcoop": _kgcoop,
    "prograd": _prograd,
    "vpt": _vpt,
    "ivlp": _ivlp,
    "maple": _maple,
    "promptsrc": _promptsrc,
    "kdpl-coop": _kdpl(KdplCoop),
    "kdpl-cocoop": _kdpl(KdplCocoop),
    "mopd": _mopd,
    "promptkd": _promptkd,
}
