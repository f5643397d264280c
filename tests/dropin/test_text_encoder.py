"""An accelerated text encoder in every precision and layout, and what it remembers."""

import pytest
import torch
from torch import nn

from tests.dropin.lookalike_clip import LAYOUTS, Sizes, convert_weights
from tests.dropin.lookalikes import SMALL, build
from tests.dropin.support import distance, guard_of
from vlfast.dropin import accelerate
from vlfast.dropin.text_encoder import _KEPT_PACKINGS

CHECKED = "checked, features and gradients are the same"


def of_encoder(model, prompts=None, tokens=None):
    """Features and the context's gradient."""
    prompts = model.prompt_learner() if prompts is None else prompts
    tokens = model.tokenized_prompts if tokens is None else tokens
    features = model.text_encoder(prompts, tokens)
    upstream = torch.linspace(-1, 1, features.numel()).view_as(features).to(features.dtype)
    (gradient,) = torch.autograd.grad(features, [model.prompt_learner.ctx], upstream)
    return features.detach(), gradient


def assert_same(model, expected, features=1e-5, gradients=1e-4):
    found = of_encoder(model)
    assert found[0].dtype == expected[0].dtype and found[1].dtype == expected[1].dtype
    assert distance(found[0], expected[0]) <= features
    assert distance(found[1], expected[1]) <= gradients


def plain_layer_norms(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp64(layout):
    model = build("coop", layout=layout, classes=9).model.double()
    plain_layer_norms(model)
    model.text_encoder.dtype = torch.float64
    expected = of_encoder(model)
    report = accelerate(model)
    assert_same(model, expected, 1e-12, 1e-12)
    assert report.checks["text_encoder"] == [CHECKED]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 64])
def test_half_precision(layout, dtype, width):
    sizes = Sizes(width=width)
    exact = of_encoder(build("coop", layout=layout, classes=9, sizes=sizes).model)
    model = build("coop", layout=layout, classes=9, sizes=sizes).model
    if dtype == torch.float16:
        convert_weights(model)
    else:
        model.to(dtype)
        plain_layer_norms(model)
    model.text_encoder.dtype = dtype
    model.prompt_learner.to(dtype)
    before = of_encoder(model)
    report = accelerate(model)
    found = of_encoder(model)
    assert report.checks["text_encoder"] == [CHECKED]
    for mine, its, right in zip(found, before, exact, strict=True):
        assert mine.dtype == its.dtype == dtype
        assert distance(mine, right) <= 3 * distance(its, right) + torch.finfo(dtype).eps


@pytest.mark.parametrize("family", ["coop", "cocoop"])
def test_autocast(family):
    built = build(family)
    exact = built.step()
    with torch.autocast("cpu", torch.bfloat16):
        before = built.step()
        report = accelerate(built.model)
        found = built.step()
    assert report.checks["text_encoder"] == [CHECKED]
    for name, right in exact.gradients.items():
        mine, its = found.gradients[name], before.gradients[name]
        assert distance(mine, right) <= 3 * distance(its, right) + 2e-2, name
    assert distance(built.step().loss, exact.loss) <= 1e-5


def test_without_a_dtype_of_its_own():
    model = build("coop").model

    class Plain(type(model.text_encoder)):
        def forward(self, prompts, tokenized_prompts):
            x = (prompts + self.positional_embedding).permute(1, 0, 2)
            x = self.ln_final(self.transformer(x).permute(1, 0, 2))
            x = x[torch.arange(len(x)), tokenized_prompts.argmax(dim=-1)]
            if self.text_projection is None:
                return x
            return self.text_projection(x)

    encoder = model.text_encoder
    encoder.__class__ = Plain
    del encoder.dtype
    weight = encoder._parameters.pop("text_projection")
    for projection in (nn.Linear(*weight.shape), None):
        encoder.text_projection = projection
        expected = of_encoder(model)
        accelerate(model)
        assert_same(model, expected)
        assert guard_of(model).said == [CHECKED]
        encoder.__class__ = Plain


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [16, 90])
def test_other_lengths(layout, length):
    model = build("coop", layout=layout, sizes=Sizes(length=length)).model
    expected = of_encoder(model)
    accelerate(model)
    assert_same(model, expected)


def test_layer_scale():
    model = build("coop", layout="open_clip").model
    for block in model.text_encoder.transformer.resblocks:
        for name in ("ls_1", "ls_2"):
            scale = nn.Module()
            scale.gamma = nn.Parameter(torch.linspace(0.1, 2, 32))
            scale.__class__ = type(
                "LayerScale", (nn.Module,), {"forward": lambda self, x: x * self.gamma}
            )
            setattr(block, name, scale)
    expected = of_encoder(model)
    accelerate(model)
    assert_same(model, expected)


def test_keywords():
    model = build("coop").model
    expected = of_encoder(model)[0]
    accelerate(model)
    prompts, tokens = model.prompt_learner(), model.tokenized_prompts
    found = model.text_encoder(tokenized_prompts=tokens, prompts=prompts)
    assert distance(found.detach(), expected) <= 1e-5
    assert guard_of(model).said == [CHECKED]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("learner", ["known", "none"])
def test_positions(position, learner, verify):
    model = build("coop", position=position, n_ctx=5).model
    expected = of_encoder(model)
    accelerate(model if learner == "known" else model.text_encoder, verify=verify)
    for _ in range(2):
        assert_same(model, expected)


def test_residuals_that_start_at_zero():
    """Classes hold the same values, and yet have gradients of their own."""
    model = build("coop", classes=5).model

    class Residual(type(model.prompt_learner)):
        def forward(self):
            ctx = self.ctx + self.residual
            return self.construct_prompts(ctx, self.token_prefix, self.token_suffix)

    learner = model.prompt_learner
    learner.__class__ = Residual
    learner.residual = nn.Parameter(torch.zeros(5, *learner.ctx.shape))

    def gradients():
        features = model.text_encoder(learner(), model.tokenized_prompts)
        upstream = torch.linspace(-1, 1, features.numel()).view_as(features)
        return torch.autograd.grad(features, [learner.ctx, learner.residual], upstream)

    expected = gradients()
    report = accelerate(model)
    for found, wanted in zip(gradients(), expected, strict=True):
        assert distance(found, wanted) <= 1e-4
    assert "classes share no context" in report.checks["text_encoder"][0]


def test_what_begins_to_learn_is_checked_again():
    model = build("coop", class_specific=True).model
    with torch.no_grad():
        model.prompt_learner.ctx[:] = model.prompt_learner.ctx[0]
    expected = of_encoder(model)
    model.prompt_learner.requires_grad_(False)
    report = accelerate(model)
    found = model.text_encoder(model.prompt_learner(), model.tokenized_prompts)
    assert distance(found, expected[0]) <= 1e-5
    model.prompt_learner.requires_grad_(True)
    assert_same(model, expected)
    assert len(report.checks["text_encoder"]) == 2


def test_eot_that_is_not_the_largest_token():
    model = build("coop").model

    class ByPad(type(model.text_encoder)):
        def read(self, x, tokenized_prompts):
            x = self.ln_final(x).type(self.dtype)
            where = (tokenized_prompts != 0).sum(-1) - 2
            return x[torch.arange(len(x)), where] @ self.text_projection

    model.text_encoder.__class__ = ByPad
    expected = of_encoder(model)
    report = accelerate(model)
    with pytest.warns(UserWarning, match="features differ by"):
        found = of_encoder(model)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert type(model.text_encoder) is ByPad
    assert "restored, since features differ" in str(report)


def test_selections_of_classes_keep_few_packings():
    built = build("kdpl-coop", classes=30)
    model = built.model
    accelerate(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        index = torch.randperm(30, generator=generator)[:7].numpy()
        model(built.images, index)
    assert len(guard_of(model).encoder.packings) <= _KEPT_PACKINGS


def counted(model):
    """How often the tower runs."""
    calls = []
    ln_final = model.text_encoder.ln_final
    forward = type(ln_final).forward

    class Counted(type(ln_final)):
        def forward(self, x):
            calls.append(len(x))
            return forward(self, x)

    ln_final.__class__ = Counted
    return calls


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["coop", "promptkd"])
def test_features_are_computed_once(mode, family):
    model = build(family).target
    accelerate(model)
    encode = model.text_encoder
    calls = counted(model)
    with mode():
        first = encode(model.prompt_learner(), model.tokenized_prompts)
        del calls[:]
        again = encode(model.prompt_learner(), model.tokenized_prompts.clone())
        assert not calls and torch.equal(first, again)
        again.zero_()
        third = encode(model.prompt_learner(), model.tokenized_prompts)
        assert not calls and torch.equal(first, third)
    features = encode(model.prompt_learner(), model.tokenized_prompts)
    assert features.requires_grad and distance(features.detach(), first.clone()) <= 1e-6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_stale(mode):
    built = build("ivlp", classes=6)
    model = built.model
    accelerate(model)
    encoder, learner = model.text_encoder, model.prompt_learner
    tokens = model.tokenized_prompts

    def check():
        with mode():
            found = encoder(learner(), tokens)
            original = type(encoder).original_class.forward(encoder, learner(), tokens)
        assert distance(found, original) <= 1e-5
        return found.clone()

    seen = [check()]
    changes = [
        lambda: learner.ctx.data.mul_(-1),
        lambda: encoder.transformer.resblocks[1].VPT_shallow.data.neg_(),
        lambda: encoder.ln_final.weight.mul_(torch.linspace(0, 1, 32)),
        lambda: encoder.load_state_dict({k: v * 1.1 for k, v in encoder.state_dict().items()}),
        lambda: learner.token_suffix.mul_(-1),
        lambda: setattr(encoder, "ln_final", nn.LayerNorm(32)),
    ]
    for change in changes:
        with torch.no_grad():
            change()
        seen.append(check())
        assert distance(seen[-1], seen[-2]) > 1e-3
    with mode():
        some = torch.tensor([4, 0, 2])
        found = encoder(learner()[some], tokens[some])
    assert distance(found.clone(), seen[-1][some]) <= 1e-5


def test_trainable_weights_get_their_gradients():
    model = build("coop").model
    weights = [p for n, p in model.text_encoder.named_parameters() if "ln_" not in n]
    for weight in weights:
        weight.requires_grad_(True)
    model.prompt_learner.ctx.requires_grad_(False)

    def gradients():
        features = model.text_encoder(model.prompt_learner(), model.tokenized_prompts)
        upstream = torch.linspace(-1, 1, features.numel()).view_as(features)
        return torch.autograd.grad(features, weights, upstream)

    expected = gradients()
    accelerate(model)
    for _ in range(2):
        for found, wanted in zip(gradients(), expected, strict=True):
            assert distance(found, wanted) <= 1e-4
    assert guard_of(model).said == [CHECKED]


def test_prompts_that_share_nothing():
    """Not even SOS."""
    model = build("coop", classes=5).model
    prompts = torch.randn(5, SMALL.length, SMALL.width, requires_grad=True)
    tokens = model.tokenized_prompts

    def gradient():
        features = model.text_encoder(prompts, tokens)
        upstream = torch.linspace(-1, 1, features.numel()).view_as(features)
        return torch.autograd.grad(features, [prompts], upstream)[0]

    expected = gradient()
    accelerate(model.text_encoder)
    for _ in range(2):
        assert distance(gradient(), expected) <= 1e-4
    assert guard_of(model).said == [CHECKED]
