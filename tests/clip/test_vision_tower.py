"""The image tower with prompts against the plain one, over layouts, depths and models that must run
whole; what is refused."""

import copy
import re

import open_clip
import pytest
import torch
from torch import nn

from tests.clip import support
from tests.clip.vision_support import (
    OpenAIFullClip,
    OpenAIVision,
    openai_clip,
    plain_features,
    vision_clip,
)
from vlfast.clip.models import wrap_clip
from vlfast.clip.vision_tower import VisionTower

F16, BF16, F64 = torch.float16, torch.bfloat16, torch.float64

LAYOUTS = {
    "open_clip": vision_clip,
    "quick_gelu": lambda: vision_clip(quick_gelu=True),
    "layer_scale": lambda: vision_clip(ls_init_value=0.3),
    "no_ln_pre": lambda: vision_clip(no_ln_pre=True),
    "average": lambda: vision_clip(pool_type="avg"),
    "average_then_norm": lambda: vision_clip(pool_type="avg", final_ln_after_pool=True),
    "patch_dropout": lambda: vision_clip(patch_dropout=0.5),
    "tokens_too": lambda: vision_clip(output_tokens=True),
    "no_projection": lambda: without_projection(vision_clip()),
    "sequence_first": lambda: sequence_first(vision_clip()),
    "custom_block": lambda: vision_clip(block_type="custom", qk_norm=True),
    "openai": openai_clip,
}
WHOLE = ("custom_block",)


def without_projection(model):
    model.visual.proj = None
    return model


def sequence_first(model):
    transformer = model.visual.transformer
    transformer.batch_first = False
    for block in transformer.resblocks:
        block.attn.batch_first = False
    return model


def make_inputs(depth, n=3, batch=2, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 3, 32, 32, generator=generator, dtype=dtype)
    prompts = [torch.randn(n, 32, generator=generator, dtype=dtype) for _ in range(depth)]
    return pixels, [p.requires_grad_() for p in prompts]


def assert_same(model, tower, depth, n=3, batch=2, atol=1e-10, dtype=F64):
    pixels, prompts = make_inputs(depth, n, batch, dtype)
    found = tower(pixels, prompts)
    expected = plain_features(model, pixels, prompts)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(found, prompts, upstream)
    theirs = torch.autograd.grad(expected, prompts, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=atol * 10, rtol=1e-9)
        assert bool(mine.abs().sum(dim=-1).gt(0).all())


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_and_gradients_are_the_plain_ones(layout, depth):
    torch.manual_seed(0)
    model = LAYOUTS[layout]().double()
    tower = VisionTower(model)
    assert tower.explain().startswith("whole" if layout in WHOLE else "in parts")
    assert (tower.width, tower.depth) == (32, 4)
    assert_same(model, tower, depth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_prompts_it_is_the_model(layout):
    torch.manual_seed(0)
    model = LAYOUTS[layout]().double()
    pixels, _ = make_inputs(0)
    expected = model.encode_image(pixels)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(VisionTower(model)(pixels, []), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("n", "batch"), [(1, 1), (20, 1), (1, 5), (8, 3)])
@pytest.mark.parametrize("depth", [1, 4])
def test_awkward_shapes(n, batch, depth):
    torch.manual_seed(0)
    model = vision_clip().double()
    assert_same(model, VisionTower(model), depth, n, batch)


def test_counts_may_differ_between_blocks():
    torch.manual_seed(0)
    model = vision_clip().double()
    pixels, prompts = make_inputs(3)
    prompts[1] = prompts[1].detach()[:1]
    expected = plain_features(model, pixels, prompts)
    torch.testing.assert_close(VisionTower(model)(pixels, prompts), expected, atol=1e-10, rtol=0)


def test_one_block_alone():
    torch.manual_seed(0)
    model = vision_clip(layers=1).double()
    assert_same(model, VisionTower(model), 1)


def test_one_tensor_of_all_depths():
    model = vision_clip().double()
    pixels, prompts = make_inputs(3)
    tower = VisionTower(model)
    assert torch.equal(tower(pixels, torch.stack(prompts)), tower(pixels, prompts))


def test_several_steps_of_sgd_agree():
    torch.manual_seed(0)
    model = vision_clip(quick_gelu=True).double()
    tower = VisionTower(model)
    pixels, ours = make_inputs(4)
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    target = torch.randn(2, 24, dtype=F64)
    for encode, prompts in ((tower, ours), (lambda *a: plain_features(model, *a), theirs)):
        optimizer = torch.optim.SGD(prompts, lr=0.05, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            (encode(pixels, prompts) - target).square().sum().backward()
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=0)


@pytest.mark.parametrize("layout", ["open_clip", "openai"])
def test_half_precision_weights_take_fp32_prompts(layout):
    torch.manual_seed(0)
    model = vision_clip(cast_dtype=F16) if layout == "open_clip" else openai_clip()
    expected_model = copy.deepcopy(model)
    if layout == "open_clip":
        from open_clip.model import convert_weights_to_lp

        convert_weights_to_lp(model)
    else:
        model.convert_weights()
    pixels, prompts = make_inputs(3, dtype=torch.float32)
    tower = VisionTower(model)
    assert tower.explain().startswith("in parts")
    features = tower(pixels, prompts)
    assert features.dtype == F16
    features.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in prompts)
    exact = [p.detach().clone().requires_grad_() for p in prompts]
    expected = plain_features(expected_model, pixels, exact)
    expected.sum().backward()
    torch.testing.assert_close(features.float(), expected, atol=0.05, rtol=0)
    for mine, other in zip(prompts, exact, strict=True):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(mine.grad, other.grad, atol=0.02 * scale, rtol=0)


def test_autocast_to_bfloat16():
    torch.manual_seed(0)
    model = vision_clip()
    pixels, prompts = make_inputs(3, dtype=torch.float32)
    exact = plain_features(model, pixels, prompts)
    with torch.autocast("cpu", BF16):
        features = VisionTower(model)(pixels, prompts)
        plain = plain_features(model, pixels, prompts)
    assert features.dtype == plain.dtype == BF16
    error = (features.double() - exact.double()).abs().max()
    assert error <= 2 * (plain.double() - exact.double()).abs().max() + 0.02
    features.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in prompts)


def test_it_compiles_to_one_graph():
    torch.manual_seed(0)
    tower = VisionTower(vision_clip())
    pixels, prompts = make_inputs(3, dtype=torch.float32)
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    features, expected = compiled(pixels, prompts), tower(pixels, prompts)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(features.sum(), prompts)
    wanted = torch.autograd.grad(expected.sum(), prompts)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


class OddBlock(nn.Module):
    """Made of a block's parts, but it computes something else."""

    def __init__(self, block):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = block.ln_1, block.attn, block.ln_2, block.mlp

    def forward(self, x, attn_mask=None):
        normed = self.ln_1(x)
        x = x + 0.5 * self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OddVision(OpenAIVision):
    def forward(self, x):
        return 2 * super().forward(x)


def with_odd_block():
    model = vision_clip()
    blocks = model.visual.transformer.resblocks
    blocks[2] = OddBlock(blocks[2])
    return model


def hooked():
    model = vision_clip()
    model.visual.transformer.resblocks[1].register_forward_hook(lambda m, a, y: 1.25 * y)
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (with_odd_block, r"resblocks\[2\] is OddBlock, which computes something else"),
        (hooked, r"resblocks\[1\] has a forward hook"),
    ],
)
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_what_must_run_whole_is_the_same(make, why, depth):
    torch.manual_seed(0)
    model = make().double()
    tower = VisionTower(model)

    assert re.search(why, tower.explain())
    assert_same(model, tower, depth)


def test_another_forward_of_the_tower_is_honoured():
    torch.manual_seed(0)
    model = support.shaken(OpenAIFullClip(OddVision)).double()
    tower = VisionTower(model)
    assert "OddVision computes something else" in tower.explain()
    pixels, prompts = make_inputs(2)
    expected = 2 * plain_features(model, pixels, prompts)
    torch.testing.assert_close(tower(pixels, prompts), expected, atol=1e-10, rtol=0)


def test_hooks_come_and_go():
    model = vision_clip()
    tower = VisionTower(model)
    for module in (model.visual, model.visual.transformer):
        handle = module.register_forward_hook(lambda m, a, y: y)
        assert tower.explain().startswith("whole")
        handle.remove()
        assert tower.explain().startswith("in parts")
    assert not model.visual.ln_pre._forward_pre_hooks


def test_checkpointed_blocks_are_refused_where_they_must_run_whole():
    model = hooked()
    model.visual.set_grad_checkpointing()
    pixels, prompts = make_inputs(2, dtype=torch.float32)
    with pytest.raises(ValueError, match="turn its gradient checkpointing off"):
        VisionTower(model)(pixels, prompts)


def test_towers_that_take_no_prompts():
    vision = {**support.VISION, "layers": (1, 1, 1, 1), "head_width": 8}
    resnet = open_clip.model.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=support.TEXT)
    for model, reason in (
        (resnet, "image tower of ModifiedResNet has no class_embedding, positional_embedding"),
        (support.coca(), "CoCa pools by attention"),
        (vision_clip(pool_type="none"), "has pool_type 'none'"),
        (support.OpenAIClip(), "image tower of OpenAIClip has no conv1"),
    ):
        with pytest.raises(ValueError, match=reason):
            VisionTower(model)
    with pytest.raises(ValueError, match="ModifiedResNet"):
        _ = wrap_clip(resnet).vision_tower


def test_the_tower_is_made_once(tiny_clip):
    assert tiny_clip.vision_tower is tiny_clip.vision_tower
    assert tiny_clip.width == 32


@pytest.mark.parametrize(
    ("pixels", "prompts", "error", "match"),
    [
        (None, [], TypeError, "pixels: expected a tensor of images, got NoneType"),
        (torch.zeros(2, 3, 32, 16), [], ValueError, r"pixels: expected \[B, 3, 32, 32\], got"),
        (torch.zeros(0, 3, 32, 32), [], ValueError, "pixels: expected"),
        (torch.zeros(1, 3, 32, 32), [torch.zeros(2, 32)] * 5, ValueError, "at most 4 entries"),
        (torch.zeros(1, 3, 32, 32), [torch.zeros(2, 16)], ValueError, r"shape \[n, 32\], got"),
        (torch.zeros(1, 3, 32, 32), [torch.zeros(0, 32)], ValueError, r"entry 0 of shape"),
        (torch.zeros(1, 3, 32, 32), [torch.zeros(2, 32).long()], TypeError, "floating-point"),
        (torch.zeros(1, 3, 32, 32), [[0.0]], TypeError, "floating-point tensors, got list"),
    ],
)
def test_bad_arguments(pixels, prompts, error, match):
    with pytest.raises(error, match=match):
        VisionTower(vision_clip())(pixels, prompts)
