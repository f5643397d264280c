"""The text tower against open_clip's own, and what the perplexity objective relies on."""

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from vlfast.clip.text_model import TextModel
from vlfast.clip.text_tower import TextTower

NAMES = ["cat", "golden retriever", "yellow_school bus", "xylophone"]


@pytest.fixture(scope="module")
def tower(tiny_model):
    return TextTower(tiny_model)


@pytest.fixture
def context(tower):
    torch.manual_seed(1)
    return torch.randn(4, tower.width) * 0.1


def encode(model, texts):
    """What open_clip itself makes of whole sentences."""
    ids = SimpleTokenizer()(texts, context_length=24)
    return model.encode_text(ids).detach()


def test_hard_prompt_is_open_clips(tower, tiny_model):
    out = tower(None, tower.tokenize(NAMES, "a photo of a {name}."))
    expected = encode(tiny_model, [f"a photo of a {n.replace('_', ' ')}." for n in NAMES])
    torch.testing.assert_close(out.features, expected, atol=1e-6, rtol=1e-5)
    assert out.context_states is None


@pytest.mark.parametrize(
    ("position", "sentence"),
    [("end", "a photo of a {}."), ("middle", "a photo {} of a."), ("front", "{} a photo of a.")],
)
@pytest.mark.parametrize("per", ["all", "class"])
def test_context_of_words_is_the_sentence(tower, tiny_model, position, sentence, per):
    words = tower.embed_words("a photo of a")
    context = words if per == "all" else words.expand(len(NAMES), -1, -1)
    out = tower(context, tower.tokenize(NAMES), per=per, position=position)
    expected = encode(tiny_model, [sentence.format(n.replace("_", " ")) for n in NAMES])
    torch.testing.assert_close(out.features, expected, atol=1e-6, rtol=1e-5)


def test_frozen_words_between_context_and_name(tower, tiny_model):
    tokens = tower.tokenize(NAMES, "{ctx} of a {name}.")
    out = tower(tower.embed_words("a photo"), tokens)
    expected = encode(tiny_model, [f"a photo of a {n.replace('_', ' ')}." for n in NAMES])
    torch.testing.assert_close(out.features, expected, atol=1e-6, rtol=1e-5)


def test_one_context_an_image(tower, context):
    contexts = torch.stack([context, -context, 2 * context])
    tokens = tower.tokenize(NAMES)
    out = tower(contexts, tokens, per="image")
    assert out.features.shape == (3, len(NAMES), 32)
    assert out.context_states.shape == (3, 4, tower.width)
    for i, one in enumerate(contexts):
        alone = tower(one, tokens)
        torch.testing.assert_close(out.features[i], alone.features, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out.context_states[i], alone.context_states)


@pytest.mark.parametrize("per", ["all", "class"])
def test_index_encodes_only_those_classes(tower, context, per):
    context = context if per == "all" else context * torch.arange(1.0, 5.0).view(4, 1, 1)
    tokens = tower.tokenize(NAMES)
    index = torch.tensor([3, 1])
    some = tower(context, tokens, per=per, index=index)
    everything = tower(context, tokens, per=per)
    torch.testing.assert_close(some.features, everything.features[index], atol=1e-6, rtol=1e-5)


def test_deep_prompts_replace_the_context_positions(tower, tiny_model, context):
    """Against a plain loop over the model's blocks at full length, as IVLP does it."""
    deep = [torch.randn(4, tower.width), torch.randn(4, tower.width)]
    tokens = tower.tokenize(NAMES)
    out = tower(context, tokens, deep=deep)

    ids = torch.zeros(len(NAMES), 24, dtype=torch.int64)
    ids[:, 0] = tokens.sot
    ids[:, 5 : 5 + tokens.suffix.shape[1]] = tokens.suffix
    x = tiny_model.token_embedding(ids)
    x[:, 1:5] = context
    x = x + tiny_model.positional_embedding
    for layer, block in enumerate(tiny_model.transformer.resblocks):
        if layer:
            x = torch.cat([x[:, :1], deep[layer - 1].expand(len(x), -1, -1), x[:, 5:]], dim=1)
        x = block(x, attn_mask=tiny_model.attn_mask)
    eot = 4 + tokens.lengths
    expected = tiny_model.ln_final(x)[torch.arange(len(x)), eot] @ tiny_model.text_projection
    torch.testing.assert_close(out.features, expected, atol=1e-6, rtol=1e-5)


def test_deep_prompts_may_be_one_tensor(tower, context):
    tokens, deep = tower.tokenize(NAMES), torch.randn(2, 4, tower.width)
    stacked = tower(context, tokens, deep=deep).features
    assert torch.equal(stacked, tower(context, tokens, deep=[*deep]).features)


def test_no_words_are_embedded_as_nothing(tower):
    assert tower.embed_words("").shape == (0, tower.width)


def test_gradient_is_that_of_the_full_length_tower(tower, tiny_model, context):
    tokens = tower.tokenize(NAMES)
    weights = torch.randn(len(NAMES), 32)

    ours = context.clone().requires_grad_()
    (tower(ours, tokens).features * weights).sum().backward()

    theirs = context.clone().requires_grad_()
    ids = torch.zeros(len(NAMES), 24, dtype=torch.int64)
    ids[:, 5 : 5 + tokens.suffix.shape[1]] = tokens.suffix
    embedded = tiny_model.token_embedding(ids)
    sot = tiny_model.token_embedding.weight[tokens.sot].expand(len(NAMES), 1, -1)
    x = torch.cat([sot, theirs.expand(len(NAMES), -1, -1), embedded[:, 5:]], dim=1)
    x = tiny_model.transformer(x + tiny_model.positional_embedding, tiny_model.attn_mask)
    x = tiny_model.ln_final(x)[torch.arange(len(NAMES)), 4 + tokens.lengths]
    ((x @ tiny_model.text_projection) * weights).sum().backward()
    largest = float(theirs.grad.abs().max())
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5 * largest, rtol=0)


def test_context_states_do_not_depend_on_the_class(tower, context):
    """Sanity test (b) of PLPP: under the causal mask the states before the name are shared."""
    cat = tower(context, tower.tokenize(["cat"])).context_states
    bus = tower(context, tower.tokenize(["yellow school bus"])).context_states
    torch.testing.assert_close(cat, bus, atol=1e-6, rtol=1e-5)


def test_no_context_state_reads_the_last_vector(tower, context):
    """Sanity test (d) of PLPP: states are shifted, so the last vector predicts nothing."""
    context.requires_grad_()
    states = tower(context, tower.tokenize(NAMES)).context_states
    (gradient,) = torch.autograd.grad(states.square().sum(), context)
    assert bool((gradient[-1] == 0).all())
    assert bool((gradient[:-1].abs().sum(dim=1) > 0).all())


def test_first_state_is_that_of_sos(tower, tiny_model, context):
    states = tower(context, tower.tokenize(NAMES)).context_states
    alone = encode_states(tiny_model, torch.tensor([[SimpleTokenizer().sot_token_id]]))
    torch.testing.assert_close(states[0], alone[0, 0], atol=1e-6, rtol=1e-5)


def encode_states(model, ids):
    x = model.token_embedding(ids) + model.positional_embedding[: ids.shape[1]]
    mask = model.attn_mask[: ids.shape[1], : ids.shape[1]]
    return model.ln_final(model.transformer(x, mask)).detach()


@pytest.mark.parametrize("position", ["middle", "front"])
def test_states_of_a_split_context_precede_each_vector(tower, context, position):
    """Changing vector i changes no state of the vectors up to i, and every later one."""
    tokens = tower.tokenize(NAMES)
    before = tower(context, tokens, position=position).context_states
    assert before.shape == (len(NAMES), 4, tower.width)
    changed = context.clone()
    changed[2] = torch.randn(tower.width)
    after = tower(changed, tokens, position=position).context_states
    moved = (after - before).abs().amax(dim=-1) > 1e-6
    assert moved.tolist() == [[False, False, False, True]] * len(NAMES)


def test_empty_context(tower, tiny_model):
    out = tower(torch.empty(0, tower.width), tower.tokenize(NAMES))
    expected = encode(tiny_model, [f"{n.replace('_', ' ')}." for n in NAMES])
    torch.testing.assert_close(out.features, expected, atol=1e-6, rtol=1e-5)
    assert out.context_states.shape == (0, tower.width)


@pytest.mark.parametrize("per", ["all", "image"])
def test_a_layout_first_used_in_inference_mode_can_be_trained_with(tower, context, per):
    tokens = tower.tokenize(["cat", "big dog"])
    contexts = torch.stack([context] * 2) if per == "image" else context
    with torch.inference_mode():
        expected = tower(contexts, tokens, per=per).features
    leaf = contexts.detach().requires_grad_()
    features = tower(leaf, tokens, per=per).features
    features.sum().backward()
    assert torch.equal(features, expected)
    assert leaf.grad.abs().max() > 0


def test_master_context_in_fp32_beside_a_bf16_tower(tiny_model, context):
    import copy

    half = TextTower(copy.deepcopy(tiny_model).to(torch.bfloat16))
    context.requires_grad_()
    out = half(context, half.tokenize(NAMES))
    out.features.float().square().sum().backward()
    assert out.features.dtype == torch.bfloat16
    assert context.grad.dtype == torch.float32 and bool(context.grad.isfinite().all())


def test_custom_text_clip_reads_the_same(tiny_model):
    """open_clip has two layouts of the same model; both serve."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 24, "width": 32, "heads": 2, "layers": 2},
    }
    model = open_clip.model.CustomTextCLIP(**config).eval()
    tower = TextTower(model)
    out = tower(None, tower.tokenize(NAMES, "a photo of a {name}."))
    expected = encode(model, [f"a photo of a {n.replace('_', ' ')}." for n in NAMES])
    torch.testing.assert_close(out.features, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"no_causal_mask": True, "pool_type": "last"}, "not causal"),
        ({"embed_cls": True}, "class token"),
        ({"pool_type": "last"}, "pools the last token"),
    ],
)
def test_other_text_towers_get_whole_sequences(text, reason):
    torch.manual_seed(0)
    model = open_clip.model.CustomTextCLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 24, "width": 32, "heads": 2, "layers": 1, **text},
    ).eval()
    tower = TextTower(model)
    assert tower.explain().startswith("padded: every class is a whole sequence of 24, since")
    assert reason in tower.explain()
    tokens = tower.tokenize(NAMES)
    out = tower(tower.embed_words("a photo of a"), tokens)
    expected = encode(model, [f"a photo of a {n.replace('_', ' ')}." for n in NAMES])
    torch.testing.assert_close(out.features, expected, atol=1e-6, rtol=1e-5)


def test_a_hook_that_comes_later_changes_the_path(tower, tiny_model, context):
    tokens = tower.tokenize(NAMES)
    before = tower(context, tokens).features
    assert tower.explain(tokens).startswith("packed")
    seen = []
    with tiny_model.transformer.resblocks[1].register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    ):
        assert "resblocks[1] has a forward hook" in tower.explain(tokens)
        torch.testing.assert_close(tower(context, tokens).features, before, atol=1e-6, rtol=1e-5)
    assert seen == [(len(NAMES), 24, tower.width)]
    assert tower.explain(tokens).startswith("packed")


def test_a_model_without_text_is_refused():
    with pytest.raises(ValueError, match="token_embedding"):
        TextModel.of(torch.nn.Linear(2, 2))


def call(tower, good_context, **changes):
    given = {"context": good_context, "tokens": tower.tokenize(NAMES), **changes}
    return tower(given.pop("context"), given.pop("tokens"), **given)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"per": "images"}, ValueError, "per: expected"),
        ({"position": "begin"}, ValueError, "position: expected"),
        ({"context": None}, ValueError, "asks for a context"),
        ({"context": torch.zeros(4, 31)}, ValueError, r"context: expected \[n, 32\]"),
        ({"context": torch.zeros(3, 4, 32), "per": "class"}, ValueError, r"\[4, n, 32\]"),
        ({"context": torch.zeros(0, 4, 32), "per": "image"}, ValueError, r"\[B, n, 32\]"),
        ({"context": torch.zeros(4, 32).long()}, TypeError, "floating-point"),
        ({"context": torch.zeros(30, 32)}, ValueError, "n_ctx: 30 context tokens and the class"),
        ({"deep": [torch.zeros(3, 32)]}, ValueError, r"deep: expected entry 0 of shape \(4, 32\)"),
        ({"deep": [torch.zeros(4, 32)] * 3}, ValueError, "at most 2 entries"),
        ({"deep": [torch.zeros(4, 32)], "position": "front"}, ValueError, "deep prompts need"),
        (
            {"context": torch.zeros(2, 4, 32), "per": "image", "position": "middle"},
            ValueError,
            "at the end",
        ),
        ({"index": torch.tensor([4])}, ValueError, r"class numbers in 0..3, got 4..4"),
        ({"index": torch.tensor([0.0])}, ValueError, "int64 vector"),
        ({"index": torch.tensor([], dtype=torch.int64)}, ValueError, "non-empty int64"),
        ({"index": [0, 1]}, TypeError, "index: expected an int64 tensor, got list"),
        ({"tokens": NAMES}, TypeError, r"tokens: expected what tokenize\(\) gives, got list"),
        ({"context": [[0.0] * 32]}, TypeError, "context: expected a floating-point tensor"),
        ({"context": torch.zeros(4, 32, device="meta")}, ValueError, "context: .* got one on meta"),
        ({"deep": [torch.zeros(4, 32).long()]}, TypeError, "deep: expected a floating-point"),
        ({"deep": [[0.0]]}, TypeError, "deep: expected a floating-point tensor, got list"),
        ({"deep": [torch.zeros(4, 32, device="meta")]}, ValueError, "deep: .* got one on meta"),
    ],
)
def test_bad_input(tower, context, changes, error, match):
    with pytest.raises(error, match=match):
        call(tower, context, **changes)


def test_bad_templates_for_a_position(tower, context):
    with pytest.raises(ValueError, match="directly after"):
        call(tower, context, tokens=tower.tokenize(NAMES, "{ctx} of a {name}."), position="middle")
    with pytest.raises(ValueError, match="space or punctuation"):
        melting = tower.tokenize(["elep"], "{ctx} {name}hant")
        call(tower, context, tokens=melting, position="front")
    with pytest.raises(ValueError, match="hard prompt"):
        call(tower, context, tokens=tower.tokenize(NAMES, "a {name}."))
