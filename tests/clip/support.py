"""Small random models of every layout that a text tower can have, and tokenizers of other kinds."""

from __future__ import annotations

import string
from collections import OrderedDict

import open_clip
import torch
from torch import nn

SENTENCES = ("a photo of a cat.", "golden retriever", "yellow school bus of the xylophone")
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 24, "width": 32, "heads": 2, "layers": 3}


def custom_clip(cast_dtype=None, **text) -> nn.Module:
    """open_clip's CustomTextCLIP with these options of its text tower."""
    return shaken(
        open_clip.model.CustomTextCLIP(
            embed_dim=32, vision_cfg=VISION, text_cfg={**TEXT, **text}, cast_dtype=cast_dtype
        )
    )


def coca() -> nn.Module:
    """open_clip's CoCa: a class token behind the padding."""
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    decoder = {**TEXT, "attn_pooler_heads": 2}
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    return shaken(
        open_clip.CoCa(embed_dim=32, multimodal_cfg=decoder, text_cfg=text, vision_cfg=vision)
    )


def with_hugging_face_encoder(config) -> nn.Module:
    """open_clip's CustomTextCLIP whose text tower is a model of transformers."""
    from open_clip.hf_model import HFTextEncoder

    model = custom_clip()
    model.text = HFTextEncoder(
        "", output_dim=32, config=config, proj_type="linear", pooler_type="mean_pooler"
    )
    if config.is_encoder_decoder:
        model.text.transformer = model.text.transformer.encoder
    return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    """Frozen, with no parameter left at the zero or one that it starts from."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


class Fp32LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class OpenAIBlock(nn.Module):
    """A block as OpenAI's code has it: sequences first, and a mask of its own."""

    def __init__(self, width, heads, mask):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = Fp32LayerNorm(width)
        layers = [nn.Linear(width, 4 * width), open_clip.transformer.QuickGELU()]
        layers.append(nn.Linear(4 * width, width))
        names = ("c_fc", "gelu", "c_proj")
        self.mlp = nn.Sequential(OrderedDict(zip(names, layers, strict=True)))
        self.ln_2 = Fp32LayerNorm(width)
        self.attn_mask = mask

    def attention(self, x):
        mask = self.attn_mask.to(x)
        return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

    def forward(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class OpenAIClip(nn.Module):
    """The text half of OpenAI's CLIP class."""

    def __init__(self, width=32, heads=2, layers=3, length=24, block=OpenAIBlock):
        super().__init__()
        mask = torch.full((length, length), -torch.inf).triu(1)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(
            *[block(width, heads, mask) for _ in range(layers)]
        )
        self.token_embedding = nn.Embedding(49408, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width) * 0.1)
        self.ln_final = Fp32LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, 16) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.context_length = length

    @property
    def dtype(self):
        return self.text_projection.dtype

    def encode_text(self, text):
        x = self.token_embedding(text).type(self.dtype)
        x = x + self.positional_embedding.type(self.dtype)
        x = self.transformer.resblocks(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.ln_final(x).type(self.dtype)
        return x[torch.arange(len(x)), text.argmax(dim=-1)] @ self.text_projection

    def convert_weights(self):
        """What makes OpenAI's models fp16: matrices alone."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.half()
            elif isinstance(module, nn.MultiheadAttention):
                module.in_proj_weight.data = module.in_proj_weight.data.half()
                module.in_proj_bias.data = module.in_proj_bias.data.half()
        self.text_projection.data = self.text_projection.data.half()
        return self


def roberta_tokenizer(folder):
    """Words with and without the space before them are different tokens: <s> text </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return saved(tokenizer, folder, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def t5_tokenizer(folder):
    """No start token: text </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = [f"▁{word}" for word in " ".join(SENTENCES).replace(".", "").split()]
    pieces = ["<pad>", "</s>", "<unk>", *dict.fromkeys(words), "▁", ".", *string.ascii_lowercase]
    scores = [(piece, -1.0 if piece in words else -10.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return saved(tokenizer, folder, eos_token="</s>", pad_token="<pad>")


def saved(tokenizer, folder, **special):
    """As open_clip's HFTokenizer, read from ``folder``."""
    from open_clip.tokenizer import HFTokenizer
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", **special
    ).save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=24)
