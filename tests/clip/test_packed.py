"""The packed path against whole padded sequences, which the model's own text tower encodes."""

import copy
from typing import NamedTuple

import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from vlfast.clip.text_tower import TextTower
from vlfast.ops.backends import reference_only

TOKENIZER = SimpleTokenizer()
NAMES = ["cat", "golden retriever", "yellow_school bus", "café au lait 猫", "cat", "xylophone"]


@pytest.fixture(scope="module")
def model():
    """Wide enough for the errors of half precision to average out; a context length of 40."""
    torch.manual_seed(0)
    return (
        open_clip.model.CLIP(
            embed_dim=48,
            vision_cfg=open_clip.CLIPVisionCfg(
                image_size=32, layers=1, width=32, head_width=16, patch_size=16
            ),
            text_cfg=open_clip.CLIPTextCfg(context_length=40, width=64, heads=4, layers=4),
            quick_gelu=True,
        )
        .eval()
        .requires_grad_(False)
    )


class Layout(NamedTuple):
    """How the tower is called."""

    per: str = "all"
    position: str = "end"
    n_ctx: int = 5
    deep: int = 0
    template: str = "{ctx} {name}."

    def __str__(self):
        return f"{self.per}-{self.position}-{self.n_ctx}-{self.deep}-{self.template}"


LAYOUTS = [
    Layout(),
    Layout(n_ctx=0),
    Layout(n_ctx=1),
    Layout(position="middle"),
    Layout(position="middle", n_ctx=1),
    Layout(position="front"),
    Layout(template="{ctx} of a {name}, a thing."),
    Layout(deep=2),
    Layout(deep=3, n_ctx=2),
    Layout("class"),
    Layout("class", n_ctx=1),
    Layout("class", "middle"),
    Layout("class", "front", 2),
    Layout("class", deep=1),
    Layout("image"),
    Layout("image", n_ctx=1, template="{ctx} a {name}"),
    Layout("image", deep=2),
]
IMAGES = 3


def leaves(layout, classes, width, dtype, seed=0):
    """A context, and deep prompts."""
    generator = torch.Generator().manual_seed(seed)
    copies = {"all": (), "class": (classes,), "image": (IMAGES,)}[layout.per]
    shapes = [(*copies, layout.n_ctx, width)] + [(layout.n_ctx, width)] * layout.deep
    return [
        (0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for shape in shapes
    ]


def whole_sequences(layout, names):
    """For each class the ids of its sentence, 0 where a vector stands, and where vectors stand."""
    sentences, places = [], []
    n = layout.n_ctx
    before = {"end": n, "middle": n // 2, "front": 0}[layout.position]
    for name in names:
        name = name.replace("_", " ").strip()
        words = layout.template.removeprefix("{ctx}").replace("{name}", name)
        ids = TOKENIZER.encode(words.strip())
        split = len(TOKENIZER.encode(name)) if before < n else 0
        places.append([*range(1, 1 + before), *range(1 + before + split, 1 + n + split)])
        body = [0] * before + ids[:split] + [0] * (n - before) + ids[split:]
        sentences.append([TOKENIZER.sot_token_id, *body, TOKENIZER.eot_token_id])
    return sentences, places


def padded(model, layout, names, context, *deep):
    """Features and context states, every sequence at full length: open_clip's own text tower, with
    vectors written over what its token embedding, or a block, puts out."""
    sentences, places = whole_sequences(layout, names)
    ids = torch.zeros(len(names), model.context_length, dtype=torch.int64)
    for row, sentence in zip(ids, sentences, strict=True):
        row[: len(sentence)] = torch.tensor(sentence)
    row = torch.arange(len(names))[:, None]
    place = torch.tensor(places, dtype=torch.int64).reshape(len(names), -1)

    def written(x, vectors):
        vectors = vectors.to(x.dtype).expand(len(names), -1, -1)
        return x.index_put((row, place), vectors)

    def one(context):
        states = []
        hooks = [
            model.token_embedding.register_forward_hook(lambda m, i, out: written(out, context)),
            model.ln_final.register_forward_hook(lambda m, i, out: states.append(out)),
        ]
        for block, vectors in zip(model.transformer.resblocks[1:], deep, strict=False):
            hooks.append(
                block.register_forward_pre_hook(lambda m, i, v=vectors: (written(i[0], v),))
            )
        try:
            features = model.encode_text(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return features, states[0][row, place - 1]

    if layout.per == "image":
        images = [one(c) for c in context]
        return torch.stack([f for f, _ in images]), torch.stack([s[0] for _, s in images])
    features, states = one(context)
    return features, states if layout.per == "class" or layout.position != "end" else states[0]


def packed(tower, layout, names, context, *deep):
    tokens = tower.tokenize(names, layout.template)
    out = tower(context, tokens, per=layout.per, position=layout.position, deep=deep)
    return out.features, out.context_states


def with_gradients(encode, inputs):
    """Features, states and the gradients of both, weighed unevenly, to every input."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    features, states = encode(*inputs)
    generator = torch.Generator().manual_seed(7)

    def weighed(x):
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return (x.double() * weights).sum()

    loss = weighed(features) + weighed(states)
    return [features.detach(), states.detach(), *torch.autograd.grad(loss, inputs)]


def errors(actual, exact):
    """Root mean squares, relative to that of the exact tensor."""
    return [
        float((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt().clamp_min(1e-30))
        for a, e in zip(actual, exact, strict=True)
        if e.numel()
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_is_the_padded_tower_to_the_last_digits(model, layout):
    double = copy.deepcopy(model).double()
    inputs = leaves(layout, len(NAMES), 64, torch.float64)
    actual = with_gradients(lambda *x: packed(TextTower(double), layout, NAMES, *x), inputs)
    expected = with_gradients(lambda *x: padded(double, layout, NAMES, *x), inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fp32(model, layout):
    inputs = leaves(layout, len(NAMES), 64, torch.float32)
    actual = with_gradients(lambda *x: packed(TextTower(model), layout, NAMES, *x), inputs)
    expected = with_gradients(lambda *x: padded(model, layout, NAMES, *x), inputs)
    (features, *gradients), (padded_features, *padded_gradients) = actual, expected
    largest = float(padded_features.abs().max())
    torch.testing.assert_close(features, padded_features, atol=1e-6 * max(1, largest), rtol=0)
    for a, e in zip(gradients, padded_gradients, strict=True):
        if e.numel():
            torch.testing.assert_close(a, e, atol=1e-5 * float(e.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *((layout, torch.bfloat16) for layout in LAYOUTS),
        # A CPU is slow in fp16.
        *((LAYOUTS[i], torch.float16) for i in (0, 3, 7, 9)),
    ],
    ids=str,
)
def test_half_precision_is_as_precise_as_the_padded_tower(model, layout, dtype):
    half = copy.deepcopy(model).to(dtype)
    check_precision(half, layout, lambda encode: encode)


@pytest.mark.parametrize("layout", [LAYOUTS[i] for i in (0, 3, 7, 9, 14)], ids=str)
def test_autocast_is_as_precise_as_the_padded_tower(model, layout):
    def cast(encode):
        def run(*inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return encode(*inputs)

        return run

    check_precision(model, layout, cast)


def check_precision(model, layout, wrap):
    """Against the same weights in fp64. Rounding errors are by chance: of a single gradient they
    may be half as large again, on the average they are the same."""
    names = [f"{name} {i}" for name in NAMES for i in range(4)]
    double = copy.deepcopy(model).double()
    ours, theirs = [], []
    for seed in range(4):
        inputs = leaves(layout, len(names), 64, torch.float32, seed)
        exact = with_gradients(
            lambda *x: padded(double, layout, names, *x), [x.double() for x in inputs]
        )
        for found, encode in (
            (ours, lambda *x: packed(TextTower(model), layout, names, *x)),
            (theirs, lambda *x: padded(model, layout, names, *x)),
        ):
            found.append(errors(with_gradients(wrap(encode), inputs), exact))
    ours, theirs = (torch.tensor(x).square().mean(0).sqrt() for x in (ours, theirs))
    ratios = ours / theirs
    assert float(ratios.log().mean().exp()) <= 1.15 and float(ratios.max()) <= 1.6, ratios


WORDS = st.text(st.sampled_from("abcdefgh éß猫🐈'-_0123456789"), min_size=1, max_size=30)
SENTENCES = st.lists(WORDS.filter(lambda w: w.replace("_", " ").strip()), min_size=1, max_size=7)


@settings(deadline=None, max_examples=60)
@example(names=["-_"], position="end", per="all", n_ctx=0)
@given(
    names=SENTENCES,
    position=st.sampled_from(["end", "middle", "front"]),
    per=st.sampled_from(["all", "class"]),
    n_ctx=st.integers(0, 6),
)
def test_any_names(model, names, position, per, n_ctx):
    layout = Layout(per, position, n_ctx)
    fits = [n for n in names if len(TOKENIZER.encode(n.replace("_", " "))) <= 28]
    if not fits:
        return
    inputs = leaves(layout, len(fits), 64, torch.float32)
    tokens = TextTower(model).tokenize(fits)
    if position != "end" and not tokens.separable:
        return
    actual = with_gradients(lambda *x: packed(TextTower(model), layout, fits, *x), inputs)
    expected = with_gradients(lambda *x: padded(model, layout, fits, *x), inputs)
    for a, e in zip(actual, expected, strict=True):
        if e.numel():
            torch.testing.assert_close(a, e, atol=1e-5 * float(e.abs().max()), rtol=0)


def test_a_name_of_forty_tokens_beside_one_of_one():
    long_model = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg=open_clip.CLIPVisionCfg(
            image_size=32, layers=1, width=32, head_width=16, patch_size=16
        ),
        text_cfg=open_clip.CLIPTextCfg(context_length=77, width=32, heads=2, layers=2),
    ).requires_grad_(False)
    names = ["cat", " ".join(["cat"] * 40), "dog"]
    assert len(TOKENIZER.encode(names[1])) == 40
    inputs = leaves(Layout(n_ctx=16), 3, 32, torch.float32)
    layout = Layout(n_ctx=16)
    actual = with_gradients(lambda *x: packed(TextTower(long_model), layout, names, *x), inputs)
    expected = with_gradients(lambda *x: padded(long_model, layout, names, *x), inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5 * float(e.abs().max()), rtol=0)


def test_hard_prompts_share_their_words(model):
    """As far as all sentences begin alike; with one class, all but EOT."""
    tower = TextTower(model)
    template = "a photo of a {name}."
    layout = Layout(n_ctx=0, template=template)
    empty = torch.zeros(0, 64)
    tokens = tower.tokenize(NAMES, template)
    expected, _ = padded(model, layout, NAMES, empty)
    torch.testing.assert_close(tower(None, tokens).features, expected, atol=1e-6, rtol=1e-5)
    assert tokens.layout(0, "all", "end", 1, torch.device("cpu")).runs.longest_prefix == 5
    one = tower.tokenize(["cat"], template)
    torch.testing.assert_close(tower(None, one).features, expected[:1], atol=1e-6, rtol=1e-5)
    assert one.layout(0, "all", "end", 1, torch.device("cpu")).runs.longest == 1


def test_packed_rows_are_what_is_needed_and_no_more(model):
    """One prefix, and of every class its own tokens: nothing is padded."""
    tokens = TextTower(model).tokenize(["cat", "golden retriever"])
    layout = tokens.layout(5, "all", "end", 1, torch.device("cpu"))
    own = [len(TOKENIZER.encode(f"{n}.")) + 1 for n in ("cat", "golden retriever")]
    assert len(layout.ids) == 6 + sum(own)
    of_images = tokens.layout(5, "image", "end", 3, torch.device("cpu"))
    assert len(of_images.ids) == 3 * len(layout.ids)


def test_only_eot_goes_through_the_last_mlp(model):
    rows = []
    hooks = [
        block.mlp.register_forward_hook(lambda m, i, out: rows.append(len(out)))
        for block in model.transformer.resblocks
    ]
    try:
        tower = TextTower(model)
        tokens = tower.tokenize(NAMES)
        tower(torch.zeros(5, 64), tokens)
    finally:
        for hook in hooks:
            hook.remove()
    packed_rows = len(tokens.layout(5, "all", "end", 1, torch.device("cpu")).ids)
    assert rows == [packed_rows] * 3 + [len(NAMES), 5]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_index_is_encoding_those_classes_alone(model, layout):
    tower = TextTower(model)
    context, *deep = leaves(layout, len(NAMES), 64, torch.float32)
    tokens = tower.tokenize(NAMES, layout.template)
    index = torch.tensor([5, 1, 1, 3])
    how = {"per": layout.per, "position": layout.position, "deep": deep}
    some = tower(context, tokens, index=index, **how)
    everything = tower(context, tokens, **how)
    torch.testing.assert_close(
        some.features, everything.features[..., index, :], atol=2e-6, rtol=1e-5
    )
    states = everything.context_states
    if layout.per == "class" or layout.position != "end":
        states = states[index]
    torch.testing.assert_close(some.context_states, states, atol=2e-6, rtol=1e-5)


def test_index_encodes_no_other_class(model):
    tower = TextTower(model)
    tokens = tower.tokenize([f"thing {i}" for i in range(500)])
    rows = []
    hook = model.transformer.resblocks[0].mlp.register_forward_hook(
        lambda m, i, out: rows.append(len(out))
    )
    try:
        tower(torch.zeros(5, 64), tokens, index=torch.tensor([7, 400]))
    finally:
        hook.remove()
    assert rows[0] < 20


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_chunks_give_the_same(model, layout, share):
    """With less memory than it takes at once; 2 % is less than one class or image needs."""
    names = [f"{name} {i}" for name in NAMES for i in range(4)]
    inputs = leaves(layout, len(names), 64, torch.float64)
    double = copy.deepcopy(model).double()
    at_once = with_gradients(lambda *x: packed(TextTower(double), layout, names, *x), inputs)
    rows = int(TextTower(double).tokenize(names, layout.template).lengths.sum())
    images = IMAGES if layout.per == "image" else 1
    whole = rows * images * 4 * 64 * 8 * 12
    tower = TextTower(double, max_memory=int(share * whole))
    calls = []
    hook = double.ln_final.register_forward_hook(lambda m, i, out: calls.append(len(out)))
    try:
        in_chunks = with_gradients(lambda *x: packed(tower, layout, names, *x), inputs)
    finally:
        hook.remove()
    assert len(calls) > 4
    for a, e in zip(in_chunks, at_once, strict=True):
        torch.testing.assert_close(a, e, atol=1e-12, rtol=1e-10)


def test_a_chunk_keeps_only_its_arguments(model):
    """What is saved for the backward does not grow with the number of classes."""
    kept = []
    for classes in (40, 400):
        tower = TextTower(model, max_memory=2**20)
        tokens = tower.tokenize([f"thing {i}" for i in range(classes)])
        context = torch.zeros(5, 64, requires_grad=True)
        tower(context, tokens)  # measures once what a row takes
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x
        ):
            tower(context, tokens)
        kept.append(sum(sizes))
    assert kept[1] <= kept[0] + 400 * 48 * 4


def test_chunks_without_gradients(model):
    tower = TextTower(model, max_memory=2**18)
    names = [f"thing {i}" for i in range(300)]
    tokens = tower.tokenize(names)
    context = torch.randn(5, 64)
    with torch.no_grad():
        features = tower(context, tokens).features
    torch.testing.assert_close(
        features, TextTower(model)(context, tokens).features, atol=1e-6, rtol=1e-5
    )


def test_chunks_do_not_depend_on_what_was_measured_first(model):
    """Prompts that do not learn keep nothing, and what others keep depends on the model."""

    def chunks(tower, tokens, context):
        tower(context, tokens)
        calls = []
        with tower.text.ln_final.register_forward_hook(lambda m, i, out: calls.append(len(out))):
            tower(context, tokens)
        return len(calls)

    wide = copy.deepcopy(model)
    for block in wide.transformer.resblocks:
        block.mlp = torch.nn.Sequential(*[copy.deepcopy(block.mlp) for _ in range(4)])
    names = [f"thing {i}" for i in range(300)]
    fixed = torch.zeros(5, 64)
    learned = fixed.clone().requires_grad_()
    used = TextTower(model, max_memory=10**6)
    tokens = used.tokenize(names)
    used(fixed, tokens)
    for tower in (used, TextTower(wide, max_memory=10**6)):
        fresh = TextTower(tower.text.model, max_memory=10**6)
        expected = chunks(fresh, fresh.tokenize(names), learned)
        assert chunks(tower, tokens, learned) == expected
    fresh = TextTower(model, max_memory=10**6)
    with torch.autocast("cpu", torch.bfloat16):
        assert chunks(used, tokens, learned) == chunks(fresh, fresh.tokenize(names), learned)


def test_chunks_of_some_classes_are_not_measured_anew(model):
    tower = TextTower(model, max_memory=10**8)
    tokens = tower.tokenize([f"thing {i}" for i in range(50)])
    context = torch.zeros(5, 64, requires_grad=True)
    tower(context, tokens)
    calls = []
    with model.ln_final.register_forward_hook(lambda m, i, out: calls.append(len(out))):
        tower(context, tokens, index=torch.arange(20))
    assert calls == [20, 5]


@pytest.mark.parametrize("which", [0, 1])
def test_chunks_notice_what_changed_before_the_backward(model, which):
    """As autograd does where nothing is encoded again."""
    tower = TextTower(model, max_memory=1)
    learned = [torch.zeros(5, 64, requires_grad=True) for _ in range(2)]
    out = tower(learned[0], tower.tokenize(NAMES), deep=learned[1:])
    with torch.no_grad():
        learned[which].add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place before the backward"):
        out.features.sum().backward()


@pytest.mark.parametrize(
    ("value", "size"), [(5, 5), ("5", 5), ("2GB", 2 * 10**9), (" 1.5 MiB", 3 * 2**19), (None, None)]
)
def test_max_memory(model, value, size):
    assert TextTower(model, max_memory=value).max_memory == size


@pytest.mark.parametrize("value", [1.5, True, [1]])
def test_bad_type_of_max_memory(model, value):
    with pytest.raises(TypeError, match="max_memory: expected bytes"):
        TextTower(model, max_memory=value)


@pytest.mark.parametrize("value", [0, -1, "0GB", "GB", "two GB", "2 GBit", "1.2.3MB", ""])
def test_bad_max_memory(model, value):
    with pytest.raises(ValueError, match="at least 1 byte"):
        TextTower(model, max_memory=value)


@pytest.mark.parametrize("layout", [LAYOUTS[i] for i in (3, 7, 14)], ids=str)
def test_compiled(model, layout):
    torch.compiler.reset()
    tower = TextTower(model)
    inputs = leaves(layout, len(NAMES), 64, torch.float32)
    tokens = tower.tokenize(NAMES, layout.template)

    def encode(context, *deep):
        out = tower(context, tokens, per=layout.per, position=layout.position, deep=deep)
        return out.features, out.context_states

    compiled = with_gradients(torch.compile(encode, fullgraph=True), inputs)
    eager = with_gradients(encode, inputs)
    for a, e in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5 * float(e.abs().max()), rtol=0)


def test_compiled_once_more_for_other_tokens(model):
    torch.compiler.reset()
    tower = TextTower(model)
    context = torch.randn(3, 64)
    pools = [tower.tokenize(NAMES), tower.tokenize(["cat", "a tall tree"])]
    compiled = torch.compile(lambda tokens: tower(context, tokens).features, fullgraph=True)
    for tokens in (*pools, *pools):
        torch.testing.assert_close(
            compiled(tokens), tower(context, tokens).features, atol=1e-5, rtol=1e-5
        )


def test_compiled_hard_prompt(model):
    torch.compiler.reset()
    tower = TextTower(model)
    tokens = tower.tokenize(NAMES, "a photo of a {name}.")
    compiled = torch.compile(lambda: tower(None, tokens).features, fullgraph=True)
    torch.testing.assert_close(compiled(), tower(None, tokens).features, atol=1e-5, rtol=1e-5)


def test_the_reference_gives_the_same(model):
    inputs = leaves(LAYOUTS[0], len(NAMES), 64, torch.float32)
    kernel = with_gradients(lambda *x: packed(TextTower(model), LAYOUTS[0], NAMES, *x), inputs)
    with reference_only():
        plain = with_gradients(lambda *x: packed(TextTower(model), LAYOUTS[0], NAMES, *x), inputs)
    for a, e in zip(kernel, plain, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5 * float(e.abs().max()), rtol=0)


def test_the_same_bits_on_every_run(model):
    inputs = leaves(LAYOUTS[0], len(NAMES), 64, torch.float32)
    first, second = (
        with_gradients(lambda *x: packed(TextTower(model), LAYOUTS[0], NAMES, *x), inputs)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_frozen_weights_keep_no_input_of_a_linear_layer(model):
    """For its backward a block keeps 9 widths of a packed row, with QuickGELU 13: what the layer
    norms, the attention and the activation need."""
    tower = TextTower(model)
    tokens = tower.tokenize([f"thing {i}" for i in range(100)])
    rows = len(tokens.layout(5, "all", "end", 1, torch.device("cpu")).ids)
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def count(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        tower(torch.zeros(5, 64, requires_grad=True), tokens)
    assert sum(kept.values()) < 13.2 * rows * 64 * 4 * model.transformer.layers


def test_weights_that_learn_get_their_gradients(model):
    """Whoever leaves the tower unfrozen fine-tunes it, as with whole sequences."""
    learning = copy.deepcopy(model).requires_grad_(True)
    context = torch.randn(5, 64)
    packed(TextTower(learning), LAYOUTS[0], NAMES, context)[0].square().sum().backward()
    gradients = {n: p.grad for n, p in learning.named_parameters() if p.grad is not None}
    learning.zero_grad()
    padded(learning, LAYOUTS[0], NAMES, context)[0].square().sum().backward()
    for name, expected in learning.named_parameters():
        if expected.grad is not None:
            size = float(expected.grad.abs().max())
            torch.testing.assert_close(gradients[name], expected.grad, atol=1e-5 * size, rtol=0)


def test_twenty_thousand_names(model):
    """A dictionary for class-agnostic distillation: all of it within a budget, and a part of it
    with a gradient."""
    tower = TextTower(model, max_memory="50MB")
    tokens = tower.tokenize([f"{name} {i}" for i in range(3334) for name in NAMES])
    context = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        everything = tower(context, tokens).features
    index = torch.arange(19_000, 20_000)
    some = tower(context, tokens, index=index).features
    assert len(everything) == 20_004
    torch.testing.assert_close(some, everything[index], atol=2e-6, rtol=1e-5)
    some.square().sum().backward()
    assert bool(context.grad.isfinite().all()) and bool((context.grad != 0).any())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_on_a_gpu_nothing_waits_for_it(model, layout):
    """The numbers are those of the CPU, and a step synchronises with nothing."""
    inputs = leaves(layout, len(NAMES), 64, torch.float32)
    expected = with_gradients(lambda *x: packed(TextTower(model), layout, NAMES, *x), inputs)
    tower = TextTower(copy.deepcopy(model).cuda())
    tokens = tower.tokenize(NAMES, layout.template)
    how = {"per": layout.per, "position": layout.position}
    on_gpu = [x.cuda().requires_grad_() for x in inputs]

    def step(index=None):
        out = tower(on_gpu[0], tokens, deep=on_gpu[1:], index=index, **how)
        (out.features.sum() + out.context_states.sum()).backward()

    step(torch.tensor([2, 0]))  # compiles the kernels, and lays out the classes
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    def encode(*x):
        out = tower(x[0].cuda(), tokens, deep=[y.cuda() for y in x[1:]], **how)
        return out.features.cpu(), out.context_states.cpu()

    for a, e in zip(with_gradients(encode, inputs), expected, strict=True):
        if e.numel():
            torch.testing.assert_close(a, e, atol=1e-4 * float(e.abs().max()), rtol=0)
