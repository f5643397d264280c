"""PLPP's term of an accelerated text encoder against whole sequences and plain PyTorch."""

import gc
import re
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

import vlfast
from vlfast.dropin import perplexity

WIDTH, HEADS, LENGTH, WORDS, TOP_K, WEIGHT = 16, 2, 77, 60, 7, 0.3
SOS, STOP, EOT = WORDS - 3, WORDS - 2, WORDS - 1
# Some begin alike; of a single class, of one token, longer than the context.
NAMES = [[5], [5, 9], [5, 9, 11], [7], [5, 9, 11, 12, 13, 14, 20], [30, 5]]


class Block(nn.Module):
    """LND, causal, as in openai/CLIP; with ``prompts`` those of IVLP's text blocks."""

    def __init__(self, prompts=0):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.text_layer, self.add_prompt = True, prompts > 0
        if prompts:
            self.VPT_shallow = nn.Parameter(torch.randn(prompts, WIDTH))

    def forward(self, x):
        if self.add_prompt:
            n = len(self.VPT_shallow)
            deep = self.VPT_shallow[:, None].expand(-1, x.shape[1], -1)
            x = torch.cat([x[:1], deep.half().to(x.dtype), x[1 + n :]])
        mask = torch.full((len(x), len(x)), float("-inf"), dtype=x.dtype).triu(1)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.resblocks(x)


class TextEncoder(nn.Module):
    def __init__(self, blocks, dtype):
        super().__init__()
        self.transformer = Transformer(blocks)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, WIDTH) / 4)
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, 12))
        self.dtype = dtype

    def states(self, prompts):
        """Of all positions, [C, L, d], after the final layer norm."""
        x = (prompts + self.positional_embedding.type(self.dtype)).permute(1, 0, 2)
        return self.ln_final(self.transformer(x).permute(1, 0, 2)).type(self.dtype)

    def forward(self, prompts, tokenized_prompts):
        x = self.states(prompts)
        return x[torch.arange(len(x)), tokenized_prompts.argmax(-1)] @ self.text_projection


class PromptLearner(nn.Module):
    """CoOp's, with CoCoOp's meta_net where ``conditional``; ``kept``: the position that is kept in
    class_token_position, if another than the one that is used."""

    def __init__(self, embedding, n_ctx, position, specific, kept=None):
        super().__init__()
        shape = (len(NAMES), n_ctx, WIDTH) if specific else (n_ctx, WIDTH)
        self.ctx = nn.Parameter(torch.randn(shape))
        padding = [[0] * (LENGTH - 3 - n_ctx - len(name)) for name in NAMES]
        self.tokenized_prompts = torch.tensor(
            [
                [SOS, *[1] * n_ctx, *name, STOP, EOT, *rest]
                for name, rest in zip(NAMES, padding, strict=True)
            ]
        )
        embedded = embedding(self.tokenized_prompts).detach()
        self.register_buffer("token_prefix", embedded[:, :1])
        self.register_buffer("token_suffix", embedded[:, 1 + n_ctx :])
        self.n_ctx, self.name_lens = n_ctx, [len(name) for name in NAMES]
        self.position, self.class_token_position = position, kept or position

    def assemble(self, context):
        """Also where each vector stands, [C, n]."""
        before = {"end": self.n_ctx, "middle": self.n_ctx // 2, "front": 0}[self.position]
        rows, places = [], []
        for c, length in enumerate(self.name_lens):
            length = 0 if self.position == "end" else length
            name, rest = self.token_suffix[c, :length], self.token_suffix[c, length:]
            vectors = context[c]
            parts = [self.token_prefix[c], vectors[:before], name, vectors[before:], rest]
            rows.append(torch.cat(parts))
            places.append([1 + k + (length if k >= before else 0) for k in range(self.n_ctx)])
        return torch.stack(rows), torch.tensor(places)

    def contexts(self):
        return self.ctx if self.ctx.ndim == 3 else self.ctx.expand(len(NAMES), -1, -1)

    def forward(self):
        return self.assemble(self.contexts())[0]


class ConditionalLearner(PromptLearner):
    def __init__(self, embedding, n_ctx):
        super().__init__(embedding, n_ctx, "end", False)
        del self.class_token_position
        self.meta_net = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, WIDTH))

    def forward(self, im_features):
        shifted = self.ctx + self.meta_net(im_features)[:, None]
        each = [context.expand(len(NAMES), -1, -1) for context in shifted]
        return torch.stack([self.assemble(context)[0] for context in each])


class CustomCLIP(nn.Module):
    def __init__(self, learner, encoder):
        super().__init__()
        self.prompt_learner, self.text_encoder = learner, encoder
        self.tokenized_prompts = learner.tokenized_prompts

    def forward(self, images, index=None):
        if isinstance(self.prompt_learner, ConditionalLearner):
            prompts = self.prompt_learner(images)
            text = [self.text_encoder(p, self.tokenized_prompts) for p in prompts]
            return 3 * torch.einsum("bd,bcd->bc", images, torch.stack(text))
        prompts, tokens = self.prompt_learner(), self.tokenized_prompts
        if index is not None:
            prompts, tokens = prompts[index], tokens[index]
        return 3 * images @ self.text_encoder(prompts, tokens).T


def make(position="end", specific=False, n_ctx=5, deep=0, conditional=False, kept=None):
    torch.manual_seed(0)
    embedding = nn.Embedding(WORDS, WIDTH)
    blocks = [Block(), *(Block(deep) for _ in range(2))]
    encoder = TextEncoder(blocks, torch.float64)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("VPT" in name)
    if conditional:
        learner = ConditionalLearner(embedding, n_ctx)
    else:
        learner = PromptLearner(embedding, n_ctx, position, specific, kept)
    return CustomCLIP(learner, encoder).double(), embedding.double()


def plain_term(vectors, states, embedding):
    """METHODS 5, rows 1-22: labels by cosine, the tied head, both cross-entropies, their targets
    detached. vectors, states: [..., d]."""
    words = embedding.weight.detach()
    cosines = functional.normalize(vectors, dim=-1) @ functional.normalize(words, dim=-1).T
    top, index = cosines.topk(TOP_K, dim=-1)
    log_y = top.log_softmax(-1)
    log_p = (states @ words.T).log_softmax(-1).gather(-1, index)
    forward = -(log_y.exp().detach() * log_p).sum(-1).mean()
    inverse = -(log_p.softmax(-1).detach() * log_y).sum(-1).mean()
    return forward + 0.5 * inverse


def plain_loss(model, embedding, images, labels, index=None):
    """CE + weight * term, with whole sequences of 77 tokens."""
    learner, encoder = model.prompt_learner, model.text_encoder
    if isinstance(learner, ConditionalLearner):
        shifted = learner.ctx + learner.meta_net(images)[:, None]
        contexts = [context.expand(len(NAMES), -1, -1) for context in shifted]
    else:
        contexts = [learner.contexts()]
    logits, terms = [], []
    ends = model.tokenized_prompts.argmax(-1)
    for context in contexts:
        prompts, places = learner.assemble(context)
        chosen = torch.arange(len(NAMES)) if index is None else torch.as_tensor(index)
        prompts, places, end = prompts[chosen], places[chosen], ends[chosen]
        row = torch.arange(len(chosen))
        states = encoder.states(prompts)
        logits.append(3 * images @ (states[row, end] @ encoder.text_projection).T)
        terms.append(
            plain_term(prompts[row[:, None], places], states[row[:, None], places - 1], embedding)
        )
    if len(contexts) > 1:
        logits = [torch.stack([of[b] for b, of in enumerate(logits)])]
    loss = functional.cross_entropy(logits[0], labels)
    return loss + WEIGHT * torch.stack(terms).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def term(model, embedding):
    return perplexity(model, embedding, top_k=TOP_K, inverse_weight=0.5)


SETTINGS = {
    "end": {},
    "end, one vector": {"n_ctx": 1},
    "middle": {"position": "middle"},
    "middle, one vector": {"position": "middle", "n_ctx": 1},
    "front": {"position": "front"},
    "specific, end": {"specific": True},
    "specific, middle": {"specific": True, "position": "middle", "n_ctx": 4},
    "specific, front": {"specific": True, "position": "front"},
    "per image": {"conditional": True},
    "deep": {"deep": 5},
    "position not asked": {"kept": "middle"},
    "position not asked, front": {"kept": "front"},
}


@pytest.mark.parametrize("images", [3, 1])
@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_and_gradients_are_the_plain_ones(setting, images):
    model, embedding = make(**SETTINGS[setting])
    pixels, labels = torch.randn(images, 12).double(), torch.arange(images)
    vlfast.accelerate(model)
    for _ in range(2):
        expected = plain_loss(model, embedding, pixels, labels)
        wanted = gradients(model, expected)
        loss = functional.cross_entropy(model(pixels), labels)
        loss = loss + WEIGHT * term(model, embedding)
        found = gradients(model, loss)
        torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            scale = float(gradient.abs().max())
            # Deep prompts go through fp16, and so do their gradients, class by class.
            limit = 2e-3 if "VPT" in name else 1e-9
            assert float((found[name] - gradient).abs().max()) <= limit * scale, name
        with torch.no_grad():
            for parameter in model.prompt_learner.parameters():
                parameter -= 0.1 * parameter.grad
    assert embedding.weight.grad is None


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("specific", [False, True])
def test_some_classes_in_another_order(position, specific):
    model, embedding = make(position, specific)
    vlfast.accelerate(model)
    pixels, labels = torch.randn(3, 12).double(), torch.arange(3)
    for index in ([4, 0, 2, 3], [1, 5, 0, 4], [5, 4, 3, 2, 1, 0]):
        expected = plain_loss(model, embedding, pixels, labels, index)
        wanted = gradients(model, expected)
        loss = functional.cross_entropy(model(pixels, index), labels)
        loss = loss + WEIGHT * term(model, embedding)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(model, loss), wanted)


def test_a_name_that_holds_a_context_word():
    """Behind the first token, which all have, the shortest name's context holds what the others'
    names do: the same values, which are not to be shared."""
    model, embedding = make("front", n_ctx=2)
    with torch.no_grad():
        model.prompt_learner.ctx.copy_(embedding(torch.tensor([9, 11])))
    vlfast.accelerate(model, verify=False)
    pixels, labels, index = torch.randn(3, 12).double(), torch.arange(3), [0, 1, 2, 4]
    wanted = gradients(model, plain_loss(model, embedding, pixels, labels, index))
    loss = functional.cross_entropy(model(pixels, index), labels)
    loss = loss + WEIGHT * term(model, embedding)
    torch.testing.assert_close(gradients(model, loss), wanted)


def test_gradients_of_the_loss_stay_what_they_are():
    model, embedding = make("middle")
    vlfast.accelerate(model)
    pixels, labels = torch.randn(3, 12).double(), torch.arange(3)
    wanted = gradients(model, functional.cross_entropy(model(pixels), labels))
    loss = functional.cross_entropy(model(pixels), labels)
    term(model, embedding)
    for name, gradient in gradients(model, loss).items():
        assert torch.equal(gradient, wanted[name])


def test_fp32_under_autocast():
    model, embedding = make()
    model, embedding = model.float(), embedding.float()
    model.text_encoder.dtype = torch.float32
    vlfast.accelerate(model)
    pixels = torch.randn(3, 12)
    model(pixels)
    exact = term(model, embedding).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(pixels)
    found = term(model, embedding)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, rel=2e-2)
    gradients(model, found)


def test_only_the_words_of_a_vocabulary_count():
    model, embedding = make()
    vlfast.accelerate(model)
    model(torch.randn(2, 12).double())
    known = torch.arange(WORDS) < 40
    found = perplexity(model, embedding, top_k=TOP_K, vocabulary=known)
    expected = perplexity(model, embedding.weight[:40], top_k=TOP_K)
    torch.testing.assert_close(found, expected)


def test_an_embedding_that_changes_is_read_again():
    model, embedding = make()
    vlfast.accelerate(model)
    model(torch.randn(2, 12).double())
    term(model, embedding)
    with torch.no_grad():
        embedding.weight[::2] *= 3
    torch.testing.assert_close(term(model, embedding), term(model, embedding.weight.clone()))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: setattr(weight, "data", weight.data * torch.arange(1.0, 1 + WORDS)[:, None]),
        lambda weight: setattr(weight, "data", 50 * weight.data.bfloat16()),
    ],
    ids=["data", "dtype"],
)
def test_an_embedding_that_moves_is_read_again(change):
    model, embedding = make()
    vlfast.accelerate(model)
    model(torch.randn(2, 12).double())
    term(model, embedding)
    change(embedding.weight)
    torch.testing.assert_close(term(model, embedding), term(model, embedding.weight.clone()))


def test_no_graph_outlives_the_next_call():
    model, _ = make()
    vlfast.accelerate(model)
    pixels = torch.randn(2, 12).double()
    model(pixels)
    call = model.text_encoder._vlfast.encoder.last[torch.device("cpu")]
    graph = weakref.ref(call.x)
    del call
    model(pixels)
    gc.collect()
    assert graph() is None


def test_calls_without_autograd_do_not_count():
    model, embedding = make()
    vlfast.accelerate(model)
    pixels = torch.randn(2, 12).double()
    with torch.no_grad():
        model(pixels)
    with pytest.raises(ValueError, match="has not been called with autograd yet"):
        term(model, embedding)
    model(pixels)
    before = term(model, embedding)
    with torch.no_grad():
        model(pixels)
    assert torch.equal(term(model, embedding), before)


def test_a_call_that_went_the_other_way_is_not_mistaken_for_the_one_before():
    model, embedding = make()
    vlfast.accelerate(model)
    pixels = torch.randn(2, 12).double()
    model(pixels)
    model.text_encoder.transformer.register_forward_hook(lambda *_: None)
    model(pixels)
    with pytest.raises(ValueError, match="codebase's own way"):
        term(model, embedding)


def test_data_parallel_is_looked_into():
    model, embedding = make()
    vlfast.accelerate(model)
    wrapped = nn.DataParallel(model)
    model(torch.randn(2, 12).double())
    assert torch.equal(term(wrapped, embedding), term(model, embedding))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m, e: (object(), e), TypeError, "model: expected an nn.Module, got object"),
        (lambda m, e: (make()[0], e), ValueError, "call vlfast.accelerate(model) first"),
        (lambda m, e: (m, "words"), TypeError, "token_embedding: expected an nn.Embedding"),
        (lambda m, e: (m, e.weight[0]), TypeError, "got torch.float64 [16]"),
        (
            lambda m, e: (m, e.weight[:, :8]),
            ValueError,
            "has 8 numbers a word, the prompts have 16",
        ),
        (lambda m, e: (m, e.weight.to("meta")), ValueError, "is on meta, the prompts are on cpu"),
        (
            lambda m, e: (nn.ModuleDict({"student": m, "teacher": m.twin[0]}), e),
            ValueError,
            "student.text_encoder, teacher.text_encoder",
        ),
    ],
)
def test_refusals(change, error, message):
    model, embedding = make()
    twin, _ = make()
    model.twin = [twin]
    for one in (model, twin):
        vlfast.accelerate(one)
        one(torch.randn(2, 12).double())
    with pytest.raises(error, match=re.escape(message)):
        perplexity(*change(model, embedding))


def test_prompts_that_hold_no_context_vectors():
    model, embedding = make("middle")
    vlfast.accelerate(model)
    model(torch.randn(2, 12).double())
    learner = model.prompt_learner
    with torch.no_grad():
        learner.ctx += 1
    with pytest.raises(ValueError, match="at class_token_position 'middle' nor behind SOS"):
        term(model, embedding)
    learner.bias = learner.ctx
    del learner.ctx
    with pytest.raises(ValueError, match="has no context vectors, ctx"):
        term(model, embedding)
