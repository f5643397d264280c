"""The padded path against each model's own text tower on whole sentences."""

from dataclasses import replace
from threading import Thread, get_ident

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from tests.clip import support
from vlfast.clip import padded
from vlfast.clip.padded import encode_padded, why_padded
from vlfast.clip.text_model import TextModel
from vlfast.clip.tokens import as_tokenizer, tokenize_names

NAMES = ["cat", "golden retriever", "yellow_school bus", "xylophone"]
WORDS = "a photo of a"
SENTENCES = {"end": "a photo of a {}", "middle": "a photo {} of a", "front": "{} a photo of a"}


class Family:
    """A model with its tokenizer, and what the model itself makes of whole sentences."""

    name = ""

    def __init__(self, model, tokenizer):
        self.model = model
        self.their_tokenizer = tokenizer
        self.tokenizer = as_tokenizer(tokenizer)
        self.text = TextModel.of(model)

    def words(self):
        ids = torch.tensor(self.tokenizer.encode(WORDS))
        return self.text.token_embedding(ids).detach().float()

    def tokens(self, template="{ctx} {name}"):
        return tokenize_names(self.tokenizer, NAMES, template)

    def sentences(self, position="end"):
        texts = [SENTENCES[position].format(name.replace("_", " ")) for name in NAMES]
        return self.their_tokenizer(texts, context_length=24)

    def encode(self, context, tokens=None, *, per="all", position="end", deep=()):
        tokens = self.tokens() if tokens is None else tokens
        return encode_padded(self.text, context, tokens, per=per, position=position, deep=deep)


def hugging_face_clip():
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    text = {**size, "num_attention_heads": 2, "max_position_embeddings": 24, "vocab_size": 49408}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    vision = {**size, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=16)
    return support.shaken(CLIPModel(config))


def hugging_face_siglip():
    from transformers import SiglipConfig, SiglipModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    text = {**size, "num_attention_heads": 2, "max_position_embeddings": 24, "vocab_size": 100}
    vision = {**size, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    return support.shaken(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))


def roberta():
    from transformers import RobertaConfig

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    return support.with_hugging_face_encoder(
        RobertaConfig(**size, num_attention_heads=2, max_position_embeddings=26, vocab_size=400)
    )


def t5():
    from transformers import MT5Config

    size = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2}
    return support.with_hugging_face_encoder(MT5Config(**size, vocab_size=100))


@pytest.fixture(scope="module")
def make_family(tmp_path_factory):
    made = {}

    def make(name):
        torch.manual_seed(0)
        clip = SimpleTokenizer()
        if name == "clip":
            return Family(support.custom_clip(), clip)
        if name == "siglip":
            tokenizer = support.t5_tokenizer(tmp_path_factory.mktemp("t5"))
            options = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
            return Family(support.custom_clip(**options, vocab_size=100), tokenizer)
        if name == "coca":
            return Family(support.coca(), clip)
        if name == "first":
            return Family(support.custom_clip(pool_type="first", no_causal_mask=True), clip)
        if name == "last":
            return Family(support.custom_clip(pool_type="last"), clip)
        if name == "eos":
            tokenizer = support.roberta_tokenizer(tmp_path_factory.mktemp("roberta"))
            return Family(support.custom_clip(pool_type="eos", eos_id=2), tokenizer)
        if name == "qk norm":
            return Family(support.custom_clip(qk_norm=True), clip)
        if name == "openai":
            return Family(support.shaken(support.OpenAIClip()), clip)
        if name == "openai fp16":
            return Family(support.shaken(support.OpenAIClip()).convert_weights(), clip)
        if name == "transformers clip":
            return Family(hugging_face_clip(), clip)
        if name == "transformers siglip":
            tokenizer = support.t5_tokenizer(tmp_path_factory.mktemp("t5"))
            return Family(hugging_face_siglip(), tokenizer)
        if name == "roberta":
            tokenizer = support.roberta_tokenizer(tmp_path_factory.mktemp("roberta"))
            return Family(roberta(), tokenizer)
        tokenizer = support.t5_tokenizer(tmp_path_factory.mktemp("t5"))
        return Family(t5(), tokenizer)

    def cached(name):
        if name not in made:
            made[name] = make(name)
            made[name].name = name
        return made[name]

    return cached


FAMILIES = [
    "clip",
    "siglip",
    "coca",
    "first",
    "last",
    "eos",
    "qk norm",
    "openai",
    "openai fp16",
    "transformers clip",
    "transformers siglip",
    "roberta",
    "t5",
]
CAUSAL = ["clip", "last", "eos", "qk norm", "openai", "openai fp16", "transformers clip"]


@pytest.fixture(params=FAMILIES)
def family(request, make_family):
    return make_family(request.param)


def tolerance(features):
    # Matrix products of another shape round otherwise.
    largest = float(features.detach().abs().max())
    return {"atol": 20 * torch.finfo(features.dtype).eps * largest, "rtol": 0}


def assert_no_hooks(model):
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def captured(module, call):
    """What ``module`` gave while ``call`` ran."""
    outputs = []
    with module.register_forward_hook(lambda m, args, output: outputs.append(output)):
        call()
    return outputs[0]


def positions_of_context(position, tokens, n=4):
    """int64 [C, n], read off the sentence."""
    start = int(tokens.sot is not None)
    before = {"end": n, "middle": n // 2, "front": 0}[position]
    names = tokens.name_lengths.tolist()
    return torch.tensor(
        [[start + i + (name if i >= before else 0) for i in range(n)] for name in names]
    )


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("per", ["all", "class"])
def test_context_of_words_is_the_sentence(family, position, per):
    if position == "front" and family.tokenizer.encode(" cat") != family.tokenizer.encode("cat"):
        pytest.skip("a name behind a context has another token than one that begins a text")
    context = family.words() if per == "all" else family.words().expand(len(NAMES), -1, -1)
    out = family.encode(context, per=per, position=position)
    expected = family.text.encode(family.sentences(position))
    torch.testing.assert_close(out.features, expected, **tolerance(expected))
    assert len(expected.unique(dim=0)) == len(NAMES)
    assert_no_hooks(family.model)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("position", ["end", "middle"])
@pytest.mark.parametrize("per", ["all", "class"])
def test_states_precede_each_vector(make_family, name, position, per):
    family = make_family(name)
    context = family.words() if per == "all" else family.words().expand(len(NAMES), -1, -1)
    states = family.encode(context, per=per, position=position).context_states
    ids = family.sentences(position)
    hidden = captured(family.text.ln_final, lambda: family.text.encode(ids))
    before = positions_of_context(position, family.tokens()) - 1
    expected = torch.stack([row[place] for row, place in zip(hidden, before, strict=True)])
    if per == "all" and position == "end":
        expected = expected[0]
    torch.testing.assert_close(states, expected, **tolerance(expected))


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {*CAUSAL}))
def test_towers_that_see_everything_have_no_such_states(make_family, name):
    family = make_family(name)
    assert family.encode(family.words()).context_states is None


def test_no_state_precedes_the_first_vector_without_a_start_token(make_family):
    family = make_family("clip")
    tokens = replace(family.tokens(), sot=None)
    assert family.encode(family.words(), tokens).context_states is None


def test_hard_prompt_is_the_sentence(family):
    out = family.encode(None, family.tokens("a photo of a {name}"))
    expected = family.text.encode(family.sentences())
    torch.testing.assert_close(out.features, expected, **tolerance(expected))
    assert out.context_states is None


@pytest.mark.parametrize("per", ["all", "class", "image"])
def test_gradients_are_the_models_own(family, per):
    """Against the gradient at the output of the model's own token embedding."""
    tokens, words = family.tokens(), family.words()
    shape = {"all": (), "class": (len(NAMES),), "image": (2,)}[per]
    context = words.expand(*shape, -1, -1).clone().requires_grad_()
    out = family.encode(context, per=per)
    weights = torch.randn(out.features.shape)
    (out.features * weights).sum().backward()

    leaves = []

    def make_leaf(module, args, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    expected = []
    for weight in weights if per == "image" else [weights]:
        with family.text.token_embedding.register_forward_hook(make_leaf):
            (family.text.encode(family.sentences()) * weight).sum().backward()
        places = positions_of_context("end", tokens)
        rows = zip(leaves[-1].grad.float(), places, strict=True)
        each = torch.stack([row[place] for row, place in rows])
        expected.append(each if per == "class" else each.sum(0))
    expected = torch.stack(expected) if per == "image" else expected[0]
    assert context.grad.dtype == torch.float32
    eps = torch.finfo(out.features.dtype).eps
    torch.testing.assert_close(
        context.grad, expected, atol=100 * eps * float(expected.abs().max()), rtol=0
    )


def test_one_context_an_image_is_each_alone(family):
    contexts = torch.stack([family.words(), -family.words(), 2 * family.words()])
    out = family.encode(contexts, per="image")
    for i, one in enumerate(contexts):
        alone = family.encode(one)
        torch.testing.assert_close(out.features[i], alone.features, **tolerance(alone.features))
        if alone.context_states is not None:
            torch.testing.assert_close(
                out.context_states[i], alone.context_states, **tolerance(alone.features)
            )


class Replacing(nn.Module):
    """A block whose input has vectors at the places after the start."""

    def __init__(self, block, vectors, start, batch_first):
        super().__init__()
        self.block, self.vectors, self.start = block, vectors, start
        self.batch_first = batch_first

    def forward(self, x, *args, **kwargs):
        x = x.clone() if self.batch_first else x.transpose(0, 1).clone()
        x[:, self.start : self.start + len(self.vectors)] = self.vectors.to(x.dtype)
        return self.block(x if self.batch_first else x.transpose(0, 1), *args, **kwargs)


def test_deep_prompts_replace_the_context_in_later_blocks(family):
    text = family.text
    deep = [torch.randn(4, text.width, requires_grad=True) for _ in range(2)]
    context = family.words().requires_grad_()
    out = family.encode(context, deep=deep)
    out.features.float().square().sum().backward()
    ours = [vectors.grad.clone() for vectors in deep]

    start = int(family.tokens().sot is not None)
    own = list(text.blocks)
    for layer, vectors in enumerate(deep, start=1):
        vectors.grad = None
        text.blocks[layer] = Replacing(own[layer], vectors, start, "openai" not in family.name)
    try:
        expected = text.encode(family.sentences())
        expected.float().square().sum().backward()
    finally:
        for layer, block in enumerate(own):
            text.blocks[layer] = block
    torch.testing.assert_close(out.features, expected, **tolerance(expected))
    for mine, vectors in zip(ours, deep, strict=True):
        largest = float(vectors.grad.abs().max())
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(mine, vectors.grad, atol=100 * eps * largest, rtol=0)
    assert context.grad is not None
    assert_no_hooks(family.model)


@pytest.mark.parametrize("per", ["all", "class", "image"])
def test_slices_give_what_one_call_does(make_family, monkeypatch, per):
    family = make_family("clip")
    shape = {"all": (4,), "class": (len(NAMES), 4), "image": (5, 4)}[per]
    context = torch.randn(*shape, family.text.width)
    position = "end" if per == "image" else "middle"
    deep = [torch.randn(4, family.text.width)] if per == "image" else []
    whole = family.encode(context.clone().requires_grad_(), per=per, position=position, deep=deep)

    monkeypatch.setattr(padded, "SLICE", 3)
    sizes = []
    with family.text.ln_final.register_forward_hook(lambda m, a, out: sizes.append(len(out))):
        sliced = family.encode(context, per=per, position=position, deep=deep)
    assert max(sizes) <= 3 and sum(sizes) == (20 if per == "image" else 4)
    for ours, theirs in zip(vars(sliced).values(), vars(whole).values(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), **tolerance(theirs))


def test_hooks_of_the_model_see_whole_sequences(make_family):
    family = make_family("clip")
    block = family.text.blocks[1]
    assert captured(block, lambda: family.encode(family.words())).shape == (4, 24, 32)
    with block.register_forward_hook(lambda module, args, output: 2 * output):
        out = family.encode(family.words())
        expected = family.text.encode(family.sentences())
    torch.testing.assert_close(out.features, expected, **tolerance(expected))
    assert (family.encode(family.words()).features - expected).abs().max() > 1e-3


def test_checkpointing_keeps_the_gradient(make_family):
    family = make_family("clip")
    gradients = []
    for enable in (False, True):
        family.text.tower.transformer.grad_checkpointing = enable
        context = family.words().requires_grad_()
        family.encode(context).features.square().sum().backward()
        gradients.append(context.grad)
    with pytest.raises(ValueError, match="deep: CustomTextCLIP checkpoints its blocks"):
        family.encode(context, deep=[context])
    family.text.tower.transformer.grad_checkpointing = False
    torch.testing.assert_close(*gradients)


def test_deep_prompts_need_blocks(make_family):
    family = make_family("clip")
    text = replace(family.text, blocks=())
    with pytest.raises(ValueError, match="deep: the blocks .* can't be reached"):
        encode_padded(
            text,
            family.words(),
            family.tokens(),
            per="all",
            position="end",
            deep=[family.words()],
        )


def test_hooks_go_when_the_model_fails(make_family):
    family = make_family("clip")

    def fail(module, args):
        raise RuntimeError("the model failed")

    with (
        family.text.blocks[2].register_forward_pre_hook(fail),
        pytest.raises(RuntimeError, match="the model failed"),
    ):
        family.encode(family.words(), deep=[family.words()])
    assert_no_hooks(family.model)


def test_another_thread_in_the_same_model_is_left_alone(make_family):
    """Here it comes, with a context of its own, while the hooks of the first are in the model."""
    family = make_family("clip")
    context, other = family.words(), -family.words()[:1]
    alone = family.encode(context), family.encode(other)
    found = []

    def meanwhile(module, args):
        if get_ident() == first:
            thread = Thread(target=lambda: found.append(family.encode(other)))
            thread.start()
            thread.join()

    first = get_ident()
    with family.text.blocks[1].register_forward_pre_hook(meanwhile):
        found.insert(0, family.encode(context))
    assert len(found) == 2
    for out, expected in zip(found, alone, strict=True):
        assert torch.equal(out.features, expected.features)
        assert torch.equal(out.context_states, expected.context_states)


def test_an_embedding_that_is_not_called_is_noticed(make_family):
    family = make_family("clip")
    text = replace(family.text, token_embedding=nn.Embedding(49408, 32))
    with pytest.raises(ValueError, match="does not call its token embedding"):
        encode_padded(text, family.words(), family.tokens(), per="all", position="end")


def test_master_context_in_fp32_beside_a_bf16_tower():
    torch.manual_seed(0)
    family = Family(support.custom_clip().to(torch.bfloat16), SimpleTokenizer())
    context = family.words().requires_grad_()
    deep = family.words().requires_grad_()
    out = family.encode(context, deep=[deep])
    out.features.float().square().sum().backward()
    assert out.features.dtype == torch.bfloat16
    assert context.grad.dtype == deep.grad.dtype == torch.float32


def test_prompts_that_packed_rows_serve(make_family):
    for name in ("clip", "eos", "openai", "openai fp16"):
        family = make_family(name)
        assert why_padded(family.text, family.tokens()) is None, name


class EndsEarly(SimpleTokenizer):
    """An end stands in the text, where CLIP reads."""

    def encode(self, text):
        return [self.eot_token_id, *super().encode(text)]


def test_prompts_that_need_whole_sequences(make_family):
    clip, tokens = make_family("clip").text, make_family("clip").tokens()
    assert "no start token" in why_padded(clip, replace(tokens, sot=None))
    early = tokenize_names(EndsEarly(), ["cat"], "{ctx} {name}")
    assert "does not read its features where" in why_padded(clip, early)
    roberta = make_family("eos").tokens()
    assert "does not read its features where" in why_padded(clip, roberta)
    assert why_padded(make_family("t5").text, tokens) == ("its text tower is a Hugging Face model")
