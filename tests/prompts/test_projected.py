"""A projector, and a teacher's class features instead of the student's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.trainers.support import Framed
from vlfast.clip.models import wrap_clip
from vlfast.errors import VlfastError
from vlfast.objectives import Batch, Labels, Step, Task
from vlfast.prompts import KINDS, HardPrompt, SharedContext, build_prompts
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.prompts.projected import ClassTable, ProjectedPrompts, make_projector
from vlfast.trainers.fit import TrainingStep

NAMES = ("cat", "yellow school bus", "hen", "dog")
WIDTH = 48


def table(width=WIDTH, names=NAMES, **options):
    generator = torch.Generator().manual_seed(5)
    rows = {name: torch.randn(width, generator=generator) for name in (*names, "frog", "bat")}

    def ask(asked, template):
        return functional.normalize(torch.stack([rows[name] for name in asked]), dim=-1)

    return ClassTable(names, None, width=width, **{"ask": ask, **options})


def student(clip, inner, layers=2, names=NAMES, **options):
    torch.manual_seed(0)
    prompts = ProjectedPrompts(clip, inner, layers=layers, classes=table(**options))
    return PromptedClassifier(clip, prompts, names, "a {}.")


def plain_projector(x, w, layers):
    """w: the projector's tensors by name, written out without modules."""
    x = x @ w["0.weight"].T + w["0.bias"]
    for block in range(layers - 1):
        norm, linear = 1 + 3 * block, 3 + 3 * block
        mean, var = x.mean(0), x.var(0, unbiased=False)
        x = (x - mean) / (var + 1e-5).sqrt() * w[f"{norm}.weight"] + w[f"{norm}.bias"]
        x = x.clamp_min(0) @ w[f"{linear}.weight"].T + w[f"{linear}.bias"]
    return x


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", ["hard", "framed"])
def test_steps_agree_with_plain_ones(tiny_clip, layers, kind):
    """Three steps of SGD: losses, gradients and what is learned, also the image prompts."""
    torch.manual_seed(1)
    pixels, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0, 1])
    inner = HardPrompt() if kind == "hard" else Framed(tiny_clip)
    frame = inner.frame.detach().clone() if kind == "framed" else torch.zeros(())
    model = student(tiny_clip, inner, layers)
    step = TrainingStep(Task(model, "letters"), [Labels()]).train()
    optimizer = torch.optim.SGD(
        [p for p in step.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )

    learned = dict(model.prompts.projector.named_parameters())
    plain = {name: p.detach().clone() for name, p in learned.items()}
    plain["frame"] = frame
    for tensor in plain.values():
        tensor.requires_grad_(kind == "framed" or tensor is not frame)
    momentum = {name: torch.zeros_like(tensor) for name, tensor in plain.items()}
    classes = table().of(NAMES, "")
    for _ in range(3):
        optimizer.zero_grad()
        loss, _ = step(step.look_ahead(Batch(labels, pixels)))
        loss.backward()
        optimizer.step()

        features = plain_projector(
            tiny_clip.model.encode_image(pixels + plain["frame"]), plain, layers
        )
        logits = tiny_clip.logit_scale * functional.normalize(features, dim=-1) @ classes.T
        expected = -logits.log_softmax(1)[torch.arange(6), labels].mean()
        used = {name: t for name, t in plain.items() if t.requires_grad}
        gradients = torch.autograd.grad(expected, list(used.values()))
        torch.testing.assert_close(loss, expected, rtol=2e-5, atol=1e-6)
        for (name, tensor), gradient in zip(used.items(), gradients, strict=True):
            ours = inner.frame if name == "frame" else learned[name]
            torch.testing.assert_close(ours.grad, gradient, rtol=2e-3, atol=2e-5)
            momentum[name].mul_(0.9).add_(gradient)
            with torch.no_grad():
                tensor -= 0.1 * momentum[name]
                torch.testing.assert_close(ours, tensor, rtol=1e-3, atol=2e-5)


def test_the_projector_starts_as_convolutions_of_one_pixel_do():
    torch.manual_seed(3)
    ours = make_projector(16, 24, 2)
    torch.manual_seed(3)
    theirs = nn.Sequential(
        nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 1)
    )
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a.reshape(-1), b.reshape(-1))
    x = torch.randn(5, 16)
    torch.testing.assert_close(ours(x), theirs(x[:, :, None, None])[:, :, 0, 0])


def b16_like():
    """The sizes that count in a ViT-B/16 with nine blocks, and few else."""
    import open_clip

    vision = {"image_size": 32, "layers": 9, "width": 768, "head_width": 64, "patch_size": 16}
    text = {"context_length": 24, "width": 32, "heads": 2, "layers": 1}
    return wrap_clip(open_clip.model.CLIP(embed_dim=512, vision_cfg=vision, text_cfg=text))


def test_promptkd_learns_as_many_numbers_as_the_paper_says():
    clip = b16_like()
    count = sum(p.numel() for p in make_projector(512, 768, 2).parameters())
    assert count == 986_112
    if "visual" not in KINDS:
        pytest.skip("visual prompts are not there")
    inner = build_prompts("visual", clip, num_classes=4, init=None, n_visual=4, visual_depth=9)
    model = student(clip, inner, width=768)
    learned = [p.numel() for p in model.prompts.parameters() if p.requires_grad]
    assert sum(learned) == 27_648 + 986_112 == 1_013_760


def test_what_images_do_not_depend_on_is_frozen(tiny_clip):
    inner = Framed(tiny_clip)
    student(tiny_clip, inner)
    assert inner.frame.requires_grad and not inner.unused.requires_grad


def test_batch_norm_uses_running_statistics_in_evaluation(tiny_clip):
    model = student(tiny_clip, HardPrompt())
    images = torch.randn(6, 32)
    together = model.encode_images(None, images)
    model.prompts.eval()
    alone = torch.cat([model.encode_images(None, image[None]) for image in images])
    assert not torch.allclose(together, alone, atol=1e-3)
    torch.testing.assert_close(alone, model.encode_images(None, images))
    names = set(model.prompts.state_dict())
    assert {"projector.1.running_mean", "projector.1.running_var"} <= names


def test_own_class_features_keep_the_width(tiny_clip):
    torch.manual_seed(0)
    inner = SharedContext(tiny_clip, n_ctx=3)
    prompts = ProjectedPrompts(tiny_clip, inner, layers=2)
    model = PromptedClassifier(tiny_clip, prompts, NAMES, "a {}.")
    step = Step(Task(model, "letters"), Batch(torch.zeros(4).long(), frozen=torch.randn(4, 32)))
    step.logits.sum().backward()
    assert model.width == 32 and inner.context.grad is not None
    assert (
        prompts.context_vectors() is inner.context and prompts.encodes_names and prompts.learns_text
    )
    assert prompts.learns_images and not prompts.reads_pixels


def test_class_features_by_name(tiny_clip):
    model = student(tiny_clip, HardPrompt())
    known = table().of(NAMES, "")
    assert torch.equal(model.class_features(), known)
    torch.testing.assert_close(model.for_classes(NAMES[2:]).class_features(), known[2:])
    other = model.for_classes(("cat", "frog")).class_features()
    torch.testing.assert_close(other[0], known[0])
    index = torch.tensor([3, 1])
    torch.testing.assert_close(model.encode_text(index=index).features, known[index])
    long = " ".join(["hen"] * 40)
    with_long = table(names=(long, *NAMES))
    assert with_long.of((long,), "").shape == (1, WIDTH)


def test_asked_once_and_only_for_what_is_unknown(tiny_clip):
    asked = []

    def ask(names, template):
        asked.append((tuple(names), template))
        return torch.ones(len(names), WIDTH)

    classes = ClassTable(NAMES, "a {}.", width=WIDTH, ask=ask)
    assert not asked
    classes.of(NAMES, "a {}.")
    classes.of(NAMES[:2], "a {}.")
    classes.of(("frog",), "a {}.")
    classes.of(("frog",), "a {}.")
    assert asked == [(NAMES, "a {}."), (("frog",), "a {}.")]
    classes.of(NAMES, "the {}.")  # another dataset's template, which the teacher reads
    assert asked[-1] == (NAMES, "the {}.")


def test_names_that_nobody_knows(tiny_clip):
    model = student(tiny_clip, HardPrompt(), ask=None, features=torch.randn(4, WIDTH))
    with pytest.raises(VlfastError, match="some of the 4 that .* are kept of, got 'frog'"):
        model.for_classes(("cat", "frog")).class_features()


@pytest.mark.parametrize(
    ("inner", "layers", "width", "match"),
    [
        (HardPrompt, 4, WIDTH, "projector: expected 1 to 3 layers, got 4"),
        (HardPrompt, 0, WIDTH, "projector: expected 1 to 3 layers, got 0"),
        (HardPrompt, None, WIDTH, "features have 48 numbers and those of tiny 32, so a projector"),
        (SharedContext, 2, WIDTH, "'shared' prompts have nothing to learn"),
    ],
)
def test_refusals(tiny_clip, inner, layers, width, match):
    inner = inner() if inner is HardPrompt else inner(tiny_clip, n_ctx=2)
    with pytest.raises(ValueError, match=match):
        ProjectedPrompts(tiny_clip, inner, layers=layers, classes=table(width))
