"""The lines that docs/dropin.md gives for KDPL, PromptKD, PromptSRC and MoPD against the losses of
their loops, written here from their definitions."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

import vlfast

PAGE = Path(__file__).parents[2] / "docs" / "dropin.md"
IMAGES, CLASSES, WIDTH, POOL = 5, 11, 8, 6
DTYPES = [torch.float32, torch.float16]


def lines_of(section: str) -> str:
    """The statements that a section of the page adds."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n### {section}\n")[2]
    text = re.split(r"\n##+ ", text)[0]
    found = re.findall(r"^    \+ (.*)$", text, re.MULTILINE)
    return "\n".join(found)


def features(count, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return functional.normalize(drawn, dim=-1).to(dtype)


def softmax_kl(p_logits, q_logits):
    """KL(p || q) by row."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def check(ours, loop, tensors, dtype):
    """Losses and gradients: in fp32 the loop's; in fp16 the exact ones', at least as well as the
    loop has them. ours, loop: from copies of tensors to (loss)."""

    def run(make, to):
        copies = {n: t.detach().to(to).requires_grad_() for n, t in tensors.items()}
        loss = make(copies)
        loss.backward()
        return loss.detach().double(), {n: t.grad.double() for n, t in copies.items()}

    loss, grads = run(ours, dtype)
    exact, exact_grads = run(loop, torch.float64)
    theirs, their_grads = run(loop, dtype)
    pairs = [(loss, theirs, exact)]
    pairs += [(grads[n], their_grads[n], exact_grads[n]) for n in tensors]
    for mine, other, right in pairs:
        scale = float(right.abs().max())
        if dtype == torch.float32:
            torch.testing.assert_close(mine, other, atol=1e-5 * scale, rtol=1e-5)
        error, limit = float((mine - right).abs().max()), float((other - right).abs().max())
        assert error <= max(limit, 2 * torch.finfo(dtype).eps * scale)


def run_lines(section, **names):
    exec(lines_of(section), {"vlfast": vlfast, "F": functional}, names)
    return names


def two_heads(dtype, scales):
    """Learnable student classes, and logits of both sides as the loops have them."""
    images, classes = features(IMAGES, dtype, 0), features(CLASSES, dtype, 1)
    teacher_images, teacher_classes = features(IMAGES, dtype, 2), features(CLASSES, dtype, 3)

    def logits(learned):
        to = learned.dtype
        student = scales[0] * images.to(to) @ learned.t()
        return student, scales[1] * teacher_images.to(to) @ teacher_classes.to(to).t()

    return classes, logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own_terms", [False, True])
def test_kdpl(dtype, own_terms):
    """METHODS 1.11: both with the student's scale, half of each direction, batchmean. Classes are
    drawn in another order, both sides alike."""
    classes, logits = two_heads(dtype, (14.3, 14.3))
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(0))
    line = lines_of("KDPL").splitlines()[own_terms]

    def ours(t):
        student, teacher = logits(t["classes"])
        names = {"student_logits": student, "teacher_logits": teacher[:, order], "L_SCL": 0.25}
        names["student_logits"] = student[:, order]
        exec(line, {"vlfast": vlfast}, names)
        return names["loss"]

    def loop(t):
        student, teacher = (x[:, order] for x in logits(t["classes"]))
        both = softmax_kl(teacher, student).sum() + softmax_kl(student, teacher).sum()
        return 0.5 * both / IMAGES + (0.25 if own_terms else 0)

    check(ours, loop, {"classes": classes}, dtype)


def test_kdpl_from_cosines():
    """The same from cosines, with the student's scale on both sides."""
    classes, logits = two_heads(torch.float32, (1.0, 1.0))
    student, teacher = logits(classes)
    scale = torch.tensor(14.3)
    loss = vlfast.symmetric_kl_loss(student, teacher, student_scale=scale, teacher_scale=scale)
    names = run_lines(
        "KDPL", student_logits=scale * student, teacher_logits=scale * teacher, L_SCL=0.0
    )
    torch.testing.assert_close(loss, names["loss"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_promptkd(dtype, temperature):
    """METHODS 1.15: the teacher's own scale, T squared, summed over B * C, one direction."""
    classes, logits = two_heads(dtype, (14.3, 9.1))
    weight = 200.0

    def ours(t):
        student, teacher = logits(t["classes"])
        trainer = SimpleNamespace(temperature=temperature)
        names = run_lines("PromptKD", self=trainer, stu_logits=student, tea_logits=teacher)
        return weight * names["L_ukd"]

    def loop(t):
        student, teacher = (x / temperature for x in logits(t["classes"]))
        return weight * temperature**2 * softmax_kl(teacher, student).sum() / student.numel()

    check(ours, loop, {"classes": classes}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_promptsrc(dtype):
    """METHODS 1.9: KL(zero-shot || prompted) summed over B * C, one scale."""
    classes, logits = two_heads(dtype, (14.3, 14.3))

    def ours(t):
        student, zero_shot = logits(t["classes"])
        names = run_lines("PromptSRC", logits=student, zero_shot_logits=zero_shot)
        return names["L_SCL_logits"]

    def loop(t):
        student, zero_shot = logits(t["classes"])
        return softmax_kl(zero_shot, student).sum() / student.numel()

    check(ours, loop, {"classes": classes}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "num_prompts"), [(1.0, 2), (2.5, 3), (1.0, POOL)])
def test_mopd(dtype, temperature, num_prompts):
    """METHODS 1.13: gate without a scale, softmax over the chosen prompts alone, T squared in the
    distillation, temperature 1 in the selection, means over images of sums over prompts."""
    w, w2, scale = 0.8, 0.1, torch.tensor(2.6)
    labels = torch.arange(IMAGES) % CLASSES
    images, classes = features(IMAGES, dtype, 0), features(CLASSES, dtype, 1)
    pool = torch.stack([features(CLASSES, dtype, 10 + h) for h in range(POOL)])
    gate = torch.randn(WIDTH, POOL, generator=torch.Generator().manual_seed(4)).to(dtype)
    # Each prompt's advantage is larger than fp16's rounding: both choose the same.
    chosen = (images.double() @ gate.double()).sort(-1).values.diff().min()
    assert chosen > 1e-2
    lines = lines_of("MoPD").splitlines()
    assert lines[0].split() == ["return", "logits,", "image_features,", "gate"]

    def ours(t):
        def model(image):
            return scale.exp().to(dtype) * image @ t["classes"].t(), image, t["gate"]

        model.ori_embedding, model.logit_scale = pool, scale.to(dtype)
        trainer = SimpleNamespace(model=model, T=temperature, num_prompts=num_prompts)
        names = {"self": trainer, "image": images, "label": labels}
        exec("\n".join(lines[1:]), {"vlfast": vlfast, "F": functional}, names)
        return w * names["loss_1"] + (1 - w) * names["loss_2"] + w2 * names["loss_MPS"]

    def loop(t):
        to = t["gate"].dtype
        factor = scale.to(dtype).exp().to(to)
        student = scale.exp().to(dtype).to(to) * images.to(to) @ t["classes"].t()
        weights, index = (images.to(to) @ t["gate"]).topk(num_prompts, dim=-1)
        weights = weights.softmax(-1)
        distillation, selection = 0, 0
        for b in range(IMAGES):
            for i in range(num_prompts):
                teacher = factor * pool[index[b, i]].to(to) @ images[b].to(to)
                divergence = softmax_kl(teacher / temperature, student[b] / temperature)
                distillation += weights[b, i] * temperature**2 * divergence / IMAGES
                selection += weights[b, i] * -teacher.log_softmax(-1)[labels[b]] / IMAGES
        cross_entropy = functional.cross_entropy(student, labels)
        return w * cross_entropy + (1 - w) * distillation + w2 * selection

    check(ours, loop, {"classes": classes, "gate": gate}, dtype)
