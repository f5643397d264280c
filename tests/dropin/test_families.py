"""Every family's look-alike computes the same after ``accelerate`` as before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.dropin.lookalike_clip import LAYOUTS
from tests.dropin.lookalikes import FAMILIES, Built, Outcome, build
from vlfast.dropin import accelerate, restore

# Of the largest number.
LOGITS, GRADIENTS = 1e-5, 1e-4

GUIDED = 4  # of this seed's model the guide's gradient points against the labels'

VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("prograd", {"seed": GUIDED}),
    ("coop", {"position": "middle", "n_ctx": 5}),
    ("coop", {"position": "front"}),
    ("coop", {"class_specific": True}),
    ("coop", {"class_specific": True, "position": "middle"}),
    ("kgcoop", {"classes": 1, "n_ctx": 1}),
    ("cocoop", {"images": 1}),
    ("ivlp", {"depth": 1}),
    ("ivlp", {"depth": 2, "n_ctx": 5}),
    ("maple", {"depth": 1}),
    ("maple", {"depth": 2, "n_ctx": 4}),
    ("kdpl-coop", {"kept": 3}),
    ("kdpl-coop", {"kept": 4, "class_specific": True}),
    ("kdpl-cocoop", {"kept": 3}),
]


def named(variant) -> str:
    family, options = variant
    return "-".join([family, *(f"{k}={v}" for k, v in options.items())])


variants = pytest.mark.parametrize("variant", VARIANTS, ids=named)
# Every family in both layouts, its options in one.
variants_and_layouts = pytest.mark.parametrize(
    ("variant", "layout"),
    [
        pytest.param(
            variant, layout, marks=[pytest.mark.slow] if variant[1] and layout != LAYOUTS[0] else []
        )
        for variant in VARIANTS
        for layout in LAYOUTS
    ],
    ids=lambda value: value if isinstance(value, str) else named(value),
)
families = pytest.mark.parametrize("family", FAMILIES)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def make(variant, layout: str = "openai", **more) -> Built:
    """Deep prompts' gradients are not rounded class by class, which no sum over classes can
    imitate."""
    family, options = variant
    return build(family, layout=layout, **{"rounded_backward": False, **options, **more})


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert distance(found.loss, expected.loss) <= LOGITS
    assert (found.logits is None) == (expected.logits is None)
    if expected.logits is not None:
        assert distance(found.logits, expected.logits) <= LOGITS
    assert found.gradients.keys() == expected.gradients.keys() and expected.gradients
    for name, gradient in expected.gradients.items():
        assert gradient.abs().max() > 0, name
        assert found.gradients[name].dtype == gradient.dtype
        assert distance(found.gradients[name], gradient) <= GRADIENTS, name


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert torch.equal(found.loss, expected.loss)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[name], gradient), name


def forbid_the_original(built: Built, monkeypatch) -> None:
    def fail(*args):
        raise AssertionError("the codebase's own way was taken")

    encoder = type(built.target.text_encoder)
    original = getattr(encoder, "original_class", encoder)
    monkeypatch.setattr(original, "forward", fail)


@variants
@layouts
def test_same_step_and_evaluation(variant, layout, monkeypatch):
    built = make(variant, layout)
    step, logits = built.step(), built.evaluate()
    report = accelerate(built.target)
    assert "text_encoder" in report.changed or variant[0] == "vpt"
    assert_same(built.step(), step)
    forbid_the_original(built, monkeypatch)
    assert_same(built.step(), step)
    for _ in range(2):
        assert distance(built.evaluate(), logits) <= LOGITS
    assert_same(built.step(), step)


@variants_and_layouts
def test_parameters_stay_together_in_training(variant, layout):
    plain, fast = make(variant, layout), make(variant, layout)
    accelerate(fast.target)
    both = [(built, built.optimizer()) for built in (plain, fast)]
    start = {name: p.detach().clone() for name, p in plain.learnable().items()}
    for number in range(4):
        images = torch.randn(plain.images.shape, generator=torch.Generator().manual_seed(number))
        for built, optimizer in both:
            built.images = images
            built.step()
            optimizer.step()
        assert distance(fast.evaluate(), plain.evaluate()) <= 10 * LOGITS
    for name, parameter in plain.learnable().items():
        moved = (parameter - start[name]).abs().max()
        assert moved > 0, name
        limit = 10 * GRADIENTS * moved + 1e-6 * parameter.abs().max()
        assert (fast.learnable()[name] - parameter).abs().max() <= limit, name


@families
def test_restored_model_is_its_own_again(family):
    built = build(family)
    classes = {name: type(module) for name, module in built.target.named_modules()}
    attributes = {name: list(module.__dict__) for name, module in built.target.named_modules()}
    expected, logits = built.step(), built.evaluate()
    changed = accelerate(built.target).changed
    built.step(), built.evaluate()
    assert sorted(restore(built.target)) == sorted(changed)
    assert {name: type(module) for name, module in built.target.named_modules()} == classes
    found = {name: list(module.__dict__) for name, module in built.target.named_modules()}
    assert found == attributes
    assert_equal(built.step(), expected)
    assert torch.equal(built.evaluate(), logits)


@families
@layouts
def test_state_dict_stays_as_it_is(family, layout):
    built = build(family, layout=layout)
    names = [name for name, _ in built.target.named_parameters()]
    before = {k: v.clone() for k, v in built.target.state_dict().items()}
    accelerate(built.target)
    built.step(), built.evaluate()
    after = built.target.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert [name for name, _ in built.target.named_parameters()] == names


@families
@layouts
def test_other_weights_loaded_after_acceleration(family, layout):
    built, other = build(family, layout=layout, seed=3), build(family, layout=layout, seed=4)
    other.images = built.images
    accelerate(built.target)
    built.step()
    first = built.evaluate()
    built.target.load_state_dict(other.target.state_dict())
    if built.model is not built.target:
        built.model.load_state_dict(other.model.state_dict())
    if family == "vpt":  # its class features are in no state dict
        built.target.embeddings = other.target.embeddings
    expected = other.evaluate()
    assert distance(first, expected) > 100 * LOGITS
    assert distance(built.evaluate(), expected) <= LOGITS


@families
def test_base_classes_then_new_ones(family):
    """As a trainer tests on new classes: their model loads what was learned, without the names."""
    if family == "vpt":
        pytest.skip("its class features are fixed")
    base, new = [[9], [10, 11, 12], [13, 14]], [[20, 21, 22, 23], [24], [25, 26], [27, 28]]
    options = {"n_ctx": 2} if family == "coop" else {}
    learned = build(family, classes=base, **options)
    accelerate(learned.target)
    optimizer = learned.optimizer()
    learned.step()
    optimizer.step()
    state = {k: v for k, v in learned.target.state_dict().items() if "token_" not in k}
    plain, fast = build(family, classes=new, **options), build(family, classes=new, **options)
    accelerate(fast.target)
    for built in (plain, fast):
        missing, unexpected = built.target.load_state_dict(state, strict=False)
        assert not unexpected and all("token_" in name for name in missing)
    for _ in range(2):
        assert distance(fast.evaluate(), plain.evaluate()) <= LOGITS


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True])
def test_any_prompts_indices(position, class_specific):
    built = build("kdpl-coop", position=position, class_specific=class_specific, classes=9)
    calls = [None, [4], [8, 0, 3], [0, 8, 3], [5, 5, 1], [*range(9)], [*range(8, -1, -1)]]
    calls = [None if indices is None else np.array(indices) for indices in calls]

    def of(indices) -> tuple[torch.Tensor, torch.Tensor]:
        logits = built.model(built.images, indices)
        upstream = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        (gradient,) = torch.autograd.grad(logits, [built.model.prompt_learner.ctx], upstream)
        return logits.detach(), gradient

    expected = [of(indices) for indices in calls]
    accelerate(built.target)
    for indices, (logits, gradient) in zip(calls * 2, expected * 2, strict=True):
        found = of(indices)
        assert distance(found[0], logits) <= LOGITS
        assert distance(found[1], gradient) <= GRADIENTS


@families
@pytest.mark.parametrize("way", ["fp16 weights", "autocast"])
@layouts
def test_half_precision_is_as_near_to_fp32_as_before(family, way, layout):
    exact = build(family, layout=layout)
    right, right_logits = exact.step(), exact.evaluate()
    half = way == "fp16 weights"
    built = build(family, layout=layout, dtype=torch.float16 if half else torch.float32)

    def run() -> tuple[Outcome, torch.Tensor]:
        with torch.autocast("cpu", torch.float16, enabled=not half):
            return built.step(), built.evaluate()

    before, before_logits = run()
    report = accelerate(built.target)
    after, after_logits = run()
    assert not any("restored" in said for said in report.checks.get("text_encoder", ()))
    assert after_logits.dtype == before_logits.dtype
    assert nearly_as_near(after_logits, before_logits, right_logits)
    for name, gradient in before.gradients.items():
        found = after.gradients[name]
        assert found.dtype == gradient.dtype
        assert nearly_as_near(found, gradient, right.gradients[name]), name


def nearly_as_near(found, before, right) -> bool:
    right = right.double()
    found, before = ((x.double() - right).norm() / right.norm() for x in (found, before))
    return bool(found <= 2 * before + 2e-3)


@pytest.mark.parametrize("family", ["ivlp", "maple", "promptsrc"])
def test_rounding_of_deep_prompts_gradients(family):
    """The codebases send deep prompts through fp16 in fp32 models, too, and so each class's part of
    their gradients. Ours rounds the prompts alone."""
    theirs, exact = build(family), build(family, rounded_backward=False)
    expected, logits = exact.step(), theirs.evaluate()
    rounded = theirs.step()
    accelerate(theirs.target)
    found = theirs.step()
    assert distance(theirs.evaluate(), logits) <= LOGITS
    # Those of MaPLe get gradients through the image tower, too, which are rounded image by image.
    limit = 1e-3 if family == "maple" else GRADIENTS
    deep = [name for name in found.gradients if "text_encoder" in name or "prompts_text" in name]
    assert deep
    for name in deep:
        assert distance(found.gradients[name], expected.gradients[name]) <= limit
        assert distance(rounded.gradients[name], expected.gradients[name]) > GRADIENTS


@layouts
def test_teacher_encodes_its_classes_once(layout, monkeypatch):
    built = build("promptkd", layout=layout)
    teacher = built.target
    accelerate(teacher)
    built.step()
    products = []
    linear = torch.nn.Linear.forward
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda *args: products.append(1) or linear(*args)
    )

    @torch.no_grad()
    def features() -> torch.Tensor:
        return teacher.text_encoder(teacher.prompt_learner(), teacher.tokenized_prompts)

    first = features()
    assert torch.equal(features(), first) and not products
    with torch.no_grad():
        teacher.prompt_learner.ctx.mul_(2)
    assert distance(features(), first) > LOGITS and products


def test_what_has_no_text_encoder_to_exchange_says_so():
    zero_shot = build("prograd").beside
    report = accelerate(zero_shot)
    assert not report.changed and "no text encoder" in report.left[""]
    teacher = build("kdpl-coop").beside
    report = accelerate(teacher)
    assert not report.changed and "CLIP of its own" in report.left["text_encoder"]
    student = build("promptkd").model
    assert not accelerate(student).changed


def test_guidance_acts_in_the_look_alike():
    """Else ProGrad's step would be CoOp's."""
    guided, plain = build("prograd", seed=GUIDED).step(), build("coop", seed=GUIDED).step()
    assert not torch.equal(*(x.gradients["prompt_learner.ctx"] for x in (guided, plain)))
