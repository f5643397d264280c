"""The parts of a text tower against the model's own blocks, and when they can't be taken apart."""

import copy

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn
from torch.nn.utils import parametrize

from tests.clip import support
from vlfast.clip.text_model import TextModel
from vlfast.ops.packed_runs import PackedRuns
from vlfast.ops.prefix_attention import prefix_attention

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def model():
    torch.manual_seed(0)
    return support.custom_clip(ls_init_value=0.5)


@pytest.fixture
def openai():
    torch.manual_seed(0)
    return support.shaken(support.OpenAIClip())


def in_parts(text, layer, x):
    """A block on sequences [N, L, d], each a run of packed rows."""
    runs = PackedRuns.of([], [x.shape[1]] * len(x))
    rows = x.flatten(0, 1)
    attended = prefix_attention(text.qkv(layer, rows), runs)
    return text.finish_block(layer, rows, attended).view_as(x)


def by_itself(text, layer, x):
    block, length = text.blocks[layer], x.shape[1]
    if hasattr(block, "attn_mask"):
        block.attn_mask, mask = block.attn_mask[:length, :length], block.attn_mask
        made = block(x.transpose(0, 1)).transpose(0, 1)
        block.attn_mask = mask
        return made
    mask = torch.full((length, length), -torch.inf).triu(1)
    return block(x, attn_mask=mask)


def assert_same_block(text, layer=1, dtype=F32, length=7, units=10):
    x = torch.randn(3, length, text.width, generator=torch.Generator().manual_seed(2)).to(dtype)
    ours, theirs = in_parts(text, layer, x), by_itself(text, layer, x)
    assert ours.dtype == theirs.dtype
    largest = float(theirs.detach().abs().max())
    compute = BF16 if torch.is_autocast_enabled("cpu") else dtype
    tolerance = units * torch.finfo(compute).eps * largest
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    assert float((theirs - x).detach().abs().max()) > 100 * tolerance or compute != F32


def test_blocks_of_open_clip(model):
    text = TextModel.of(model)
    assert text.why_padded() is None
    assert (text.width, text.depth, text.context_length) == (32, 3, 24)
    assert (text.dtype, text.device) == (F32, torch.device("cpu"))
    for layer in range(text.depth):
        assert_same_block(text, layer)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_blocks_of_openais_layout(openai, dtype):
    if dtype == F16:
        openai.convert_weights()
    text = TextModel.of(openai)
    assert text.why_padded() is None
    assert text.dtype == dtype
    for length in (1, 7, 24):
        assert_same_block(text, dtype=dtype, length=length)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_half_precision_blocks_of_open_clip(dtype):
    torch.manual_seed(0)
    model = support.custom_clip(cast_dtype=dtype)
    open_clip.model.convert_weights_to_lp(model, dtype)
    text = TextModel.of(model)
    assert text.dtype == dtype
    assert_same_block(text, dtype=dtype)


def test_autocast_is_the_models(model, openai):
    for text in (TextModel.of(model), TextModel.of(openai)):
        with torch.autocast("cpu", BF16):
            assert text.why_padded() is None
            assert_same_block(text)
            assert text.qkv(0, torch.randn(3, 32)).dtype == BF16


@pytest.mark.parametrize("layout", ["custom", "clip", "openai", "linear projection", "none"])
def test_pool_is_what_follows_the_last_block(layout, openai, tiny_model):
    if layout == "openai":
        model = openai
    elif layout == "clip":
        model = tiny_model
    else:
        options = {"linear projection": {"proj_bias": True}, "none": {"proj_type": "none"}}
        model = support.custom_clip(**options.get(layout, {}))
    text = TextModel.of(model)
    ids = SimpleTokenizer()(["a cat", "a yellow school bus"], context_length=24)
    last = []
    with text.blocks[-1].register_forward_hook(lambda module, args, output: last.append(output)):
        expected = text.encode(ids)
    hidden = last[0] if text.batch_first else last[0].transpose(0, 1)
    eot = ids.argmax(1)
    torch.testing.assert_close(text.pool(hidden[torch.arange(2), eot]), expected)


def test_encode_is_not_normalised(model):
    ids = SimpleTokenizer()(["a cat", "a yellow school bus"], context_length=24)
    torch.testing.assert_close(TextModel.of(model).encode(ids), model.encode_text(ids))
    torch.testing.assert_close(TextModel.of(model.text).encode(ids), model.encode_text(ids))
    coca = support.coca()
    features = TextModel.of(coca).encode(ids)
    torch.testing.assert_close(features, coca.text(ids)[0])
    assert (features.norm(dim=1) - 1).abs().min() > 1e-3


class LowRank(nn.Module):
    """A linear layer and what LoRA adds to it."""

    def __init__(self, linear, rank=2):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)

    @property
    def weight(self):
        return self.linear.weight

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def test_low_rank_adapters_of_the_mlp(model):
    text = TextModel.of(model)
    mlp = text.blocks[1].mlp
    before = in_parts(text, 1, torch.ones(1, 2, 32))
    mlp.c_fc, mlp.c_proj = LowRank(mlp.c_fc), LowRank(mlp.c_proj)
    assert text.why_padded() is None
    assert_same_block(text)
    assert (in_parts(text, 1, torch.ones(1, 2, 32)) - before).abs().max() > 1e-2


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    ("part", "name"),
    [("attn", "in_proj_weight"), ("attn.out_proj", "weight"), ("mlp.c_fc", "weight")],
)
def test_parametrized_weights(model, part, name):
    text = TextModel.of(model)
    x = torch.randn(1, 4, 32)
    before = in_parts(text, 1, x)
    parametrize.register_parametrization(text.blocks[1].get_submodule(part), name, Doubled())
    assert text.why_padded() is None
    assert_same_block(text)
    assert (in_parts(text, 1, x) - before).abs().max() > 1e-2


def test_hooks_inside_a_block_are_called_with_packed_rows(model):
    text = TextModel.of(model)
    shapes = []
    for name in ("ln_1", "ln_2", "mlp", "mlp.c_fc", "ls_1", "ls_2"):
        text.blocks[1].get_submodule(name).register_forward_hook(
            lambda module, args, output: shapes.append(args[0].shape) or 2 * output
        )
    assert text.why_padded() is None
    in_parts(text, 1, torch.randn(2, 3, 32))
    assert shapes == [(6, 32)] * 6
    assert_same_block(text)


def test_a_hook_is_seen_when_it_comes_and_when_it_goes(model):
    text = TextModel.of(model)
    for module, where in [
        (text.blocks[2], "transformer.resblocks[2] has"),
        (text.blocks[2].attn, "transformer.resblocks[2].attn has"),
        (text.tower.transformer, "transformer has"),
        (text.tower, "its text tower has"),
    ]:
        for register in (
            module.register_forward_hook,
            module.register_forward_pre_hook,
            module.register_full_backward_hook,
            module.register_full_backward_pre_hook,
        ):
            assert text.why_padded() is None
            with register(lambda *args: None):
                assert text.why_padded().startswith(where)
                assert "hook, which needs whole sequences" in text.why_padded()


def test_hooks_on_a_model_that_is_not_called_do_not_matter(tiny_model):
    text = TextModel.of(tiny_model)
    with tiny_model.register_forward_hook(lambda *args: None):
        assert text.why_padded() is None


def drop_in_attention(block):
    block.attn.dropout = 0.1
    block.train()


def drop_in_mlp(block):
    block.mlp.c_proj = nn.Sequential(nn.Dropout(0.1), block.mlp.c_proj)
    block.mlp.c_proj.train()


def own_forward(block):
    block.forward = lambda x, attn_mask=None: x


def own_attention(block):
    block.attention = lambda *args, **kwargs: 0


def replace_attention(**options):
    def change(block):
        block.attn = nn.MultiheadAttention(32, 2, batch_first=True, **options)

    return change


def another_attention(block):
    block.attn = open_clip.transformer.Attention(32, 2)


def subclassed_attention(block):
    class Attention(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    block.attn.__class__ = Attention


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop_in_attention, "resblocks[1].attn has dropout in training mode"),
        (drop_in_mlp, "resblocks[1] has dropout in training mode"),
        (own_forward, "resblocks[1] has methods replaced in this instance"),
        (own_attention, "resblocks[1] has methods replaced in this instance"),
        (replace_attention(add_bias_kv=True), "resblocks[1].attn attends to a bias"),
        (replace_attention(add_zero_attn=True), "resblocks[1].attn attends to a bias or to zeros"),
        (replace_attention(kdim=16, vdim=16), "resblocks[1].attn has separate weights"),
        (another_attention, "resblocks[1].attn is Attention, not nn.MultiheadAttention"),
        (subclassed_attention, "resblocks[1].attn is Attention, not nn.MultiheadAttention"),
    ],
)
def test_blocks_that_need_whole_sequences(model, change, reason):
    text = TextModel.of(model)
    assert text.why_padded() is None
    change(text.blocks[1])
    assert reason in text.why_padded()
    assert reason in TextModel.of(model).why_padded()


def test_dropout_at_rest_does_not_matter(model):
    text = TextModel.of(model)
    text.blocks[1].attn.dropout = 0.1
    text.blocks[1].mlp.c_proj = nn.Sequential(nn.Dropout(0.1), text.blocks[1].mlp.c_proj)
    model.eval()
    assert text.why_padded() is None
    model.train()
    assert "dropout in training mode" in text.why_padded()
    model.eval()
    assert text.why_padded() is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"no_causal_mask": True}, "not causal (no attention mask), so a prefix can't be shared"),
        ({"embed_cls": True}, "reads a class token"),
        ({"pool_type": "last"}, "it pools the last token"),
        ({"pool_type": "first"}, "it pools the first token"),
        ({"qk_norm": True}, "not nn.MultiheadAttention"),
    ],
)
def test_towers_that_need_whole_sequences(options, reason):
    assert reason in TextModel.of(support.custom_clip(**options)).why_padded()


def test_a_mask_that_is_not_causal_is_seen(model):
    model.text.attn_mask[0, 1] = 0
    assert "not CLIP's causal one" in TextModel.of(model).why_padded()


class PostNorm(support.OpenAIBlock):
    def forward(self, x):
        x = self.ln_1(x + self.attention(x))
        return self.ln_2(x + self.mlp(x))


class NextToken(support.OpenAIBlock):
    """Its mask lets each token see the next."""

    def __init__(self, width, heads, mask):
        super().__init__(width, heads, mask.triu(2))


class Prompted(support.OpenAIBlock):
    """As forks have it: the first block is CLIP's, the others put vectors of their own in."""

    made = 0

    def __init__(self, width, heads, mask):
        super().__init__(width, heads, mask)
        self.prompted = Prompted.made > 0
        Prompted.made += 1

    def forward(self, x):
        if self.prompted:
            x = torch.cat([x[:1], x[1:3] + 1, x[3:]])
        return super().forward(x)


class TakesAList(support.OpenAIBlock):
    def forward(self, inputs):
        x, vectors = inputs
        return [super().forward(x), vectors]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (PostNorm, "transformer.resblocks[0] is PostNorm, which computes something else"),
        (NextToken, "not CLIP's causal one"),
        (Prompted, "transformer.resblocks[1] is Prompted, which computes something else"),
        (TakesAList, "is TakesAList, which computes something else than CLIP's block (tried on"),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_unknown_blocks_are_tried(block, reason, half):
    Prompted.made = 0
    model = support.shaken(support.OpenAIClip(block=block))
    assert reason in TextModel.of(model.convert_weights() if half else model).why_padded()


def test_a_tower_that_does_more_between_its_parts_is_noticed():
    class Scaled(support.OpenAIClip):
        def encode_text(self, text):
            return 2 * super().encode_text(text)

    reason = TextModel.of(support.shaken(Scaled())).why_padded()
    assert reason == "its Scaled computes something else than CLIP's text tower"


def test_an_encode_text_of_its_own_is_tried(tiny_model):
    model = copy.deepcopy(tiny_model)
    assert TextModel.of(model).why_padded() is None
    model.encode_text = lambda ids: tiny_model.encode_text(ids) + 1
    assert "its CLIP computes something else" in TextModel.of(model).why_padded()


def test_trying_leaves_no_trace(openai):
    state, weights = torch.get_rng_state(), copy.deepcopy(openai.state_dict())
    calls = []
    openai.transformer.resblocks[0].ln_1.register_forward_hook(
        lambda module, args, output: calls.append(output.requires_grad)
    )
    openai.requires_grad_(True)
    text = TextModel.of(openai)
    assert calls and not any(calls)
    tried = len(calls)
    assert text.why_padded() is None and len(calls) == tried
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(openai.state_dict()[name], value) for name, value in weights.items())
    assert all(parameter.grad is None for parameter in openai.parameters())


def test_a_dropout_is_not_run_to_try_a_block(openai):
    for block in openai.transformer.resblocks:
        block.attn.dropout = 0.1
    state = torch.get_rng_state()
    text = TextModel.of(openai.train())
    assert "dropout in training mode" in text.why_padded()
    assert torch.equal(torch.get_rng_state(), state)
    openai.eval()
    assert text.why_padded() is None


def test_a_block_put_in_later_is_tried(openai):
    text = TextModel.of(openai)
    assert text.why_padded() is None
    mask = openai.transformer.resblocks[0].attn_mask
    openai.transformer.resblocks[1] = PostNorm(32, 2, mask)
    assert "resblocks[1] is PostNorm" in text.why_padded()


def test_a_copy_reads_the_copy(model):
    text, copied = copy.deepcopy((TextModel.of(model), model))
    assert text.model is copied and text.blocks is copied.text.transformer.resblocks
    assert text.why_padded() is None


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (nn.Linear(2, 2), "Linear has no token_embedding"),
        (nn.ModuleDict({"text": nn.Linear(2, 2)}), "ModuleDict has no token_embedding"),
    ],
)
def test_a_model_without_text_is_refused(broken, match):
    with pytest.raises(ValueError, match=match):
        TextModel.of(broken)


def test_hugging_face_models_of_other_types_are_refused():
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    size["num_attention_heads"] = 2
    model = ChineseCLIPModel(ChineseCLIPConfig(text_config=size, vision_config=size))
    with pytest.raises(ValueError, match="of type 'chinese_clip', of which clip"):
        TextModel.of(model)
