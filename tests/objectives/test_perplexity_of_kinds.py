"""PLPP on conditional, independent and coupled prompts against plain PyTorch, and what each term
reaches."""

import open_clip
import pytest
import torch
from torch.nn import functional

from tests.clip.support import TEXT, VISION
from tests.prompts.support import (
    LABELS,
    NAMES,
    SETTINGS,
    deep_clip,
    images,
    make,
    plain_model,
    shake,
)
from vlfast.clip.models import wrap_clip
from vlfast.objectives import Batch, Step, Task, build_objectives
from vlfast.objectives.perplexity import Perplexity
from vlfast.ops.backends import reference_only
from vlfast.prompts import build_prompts
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.fit import TrainingStep

TOP_K, WEIGHT = 7, 0.3
HOSTS = [name for name, (kind, *_) in SETTINGS.items() if kind != "visual"]


@pytest.fixture(scope="module")
def clip():
    return deep_clip()


def plain_terms(clip, states, vectors):
    """METHODS 5: labels from the cosines of the vectors, the tied head on the states before."""
    embedding = clip.model.token_embedding.weight
    cosines = functional.normalize(vectors, dim=-1) @ functional.normalize(embedding, dim=-1).T
    top, words = cosines.topk(TOP_K, dim=-1)
    log_y = top.log_softmax(dim=-1)
    log_p = (states @ embedding.T).log_softmax(dim=-1).gather(-1, words)
    perplexity = -(log_y.exp().detach() * log_p).sum(dim=-1).mean()
    inverted = -(log_p.softmax(dim=-1).detach() * log_y).sum(dim=-1).mean()
    return perplexity, inverted


@pytest.mark.parametrize("setting", HOSTS)
def test_training_is_the_plain_one(clip, setting):
    kind, options, plainly = SETTINGS[setting]
    model = make(clip, kind, **options)
    shake(model.prompts)
    specs = [{"kind": "labels"}, {"kind": "perplexity", "weight": WEIGHT, "top_k": TOP_K}]
    training = TrainingStep(Task(model, "letters"), build_objectives(specs))
    learned = {k: v.detach().clone() for k, v in model.prompts.named_parameters()}
    learned = {k: v.requires_grad_() for k, v in learned.items()}
    ours = torch.optim.SGD(model.prompts.parameters(), lr=0.01, momentum=0.9)
    theirs = torch.optim.SGD(learned.values(), lr=0.01, momentum=0.9)
    for step in range(3):
        pixels = images(seed=step)
        ours.zero_grad()
        theirs.zero_grad()
        loss, terms = training(training.look_ahead(Batch(LABELS, pixels)))
        loss.backward()
        logits, states, vectors = plain_model(kind, clip, learned, pixels, **plainly)
        perplexity, inverted = plain_terms(clip, states, vectors)
        expected = functional.cross_entropy(logits, LABELS) + WEIGHT * (perplexity + inverted)
        expected.backward()
        torch.testing.assert_close(terms["perplexity"], perplexity.detach(), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(loss, expected, atol=3e-5, rtol=1e-5)
        for name, parameter in model.prompts.named_parameters():
            wanted = learned[name].grad
            scale = float(wanted.abs().max())
            torch.testing.assert_close(
                parameter.grad, wanted, atol=2e-4 * scale + 1e-7, rtol=1e-4, msg=name
            )
        ours.step()
        theirs.step()


def gradients(clip, setting, term):
    kind, options, _ = SETTINGS[setting]
    model = make(clip, kind, **options)
    shake(model.prompts)
    frozen = clip.encode_images(images(), normalize=False)
    step = Step(Task(model, "letters"), Batch(LABELS, images(), frozen))
    Perplexity(top_k=TOP_K)(step)[term].backward()
    return {k: v.grad for k, v in model.prompts.named_parameters()}


@pytest.mark.parametrize("setting", ["ivlp", "promptsrc", "deep_language", "maple"])
def test_deep_prompts_share_the_terms_out(clip, setting):
    """METHODS 5, row 8, and sanity test (e): the perplexity term reaches the vectors of the last
    block that replaces them, and nothing before; the inverted term those at the input alone."""
    found = gradients(clip, setting, "perplexity")
    deep = sorted(name for name in found if name.startswith("deep."))
    for name, gradient in found.items():
        reached = gradient is not None and bool(gradient.abs().sum() > 0)
        assert reached == (name == deep[-1]), name
    # Sanity test (d), here for the last block: no scored state reads its last vector.
    assert not found[deep[-1]][-1].any() and bool(found[deep[-1]][:-1].any(dim=1).all())
    inverted = gradients(clip, setting, "inverse_perplexity")
    for name, gradient in inverted.items():
        reached = gradient is not None and bool(gradient.abs().sum() > 0)
        assert reached == (name == "context"), name
    assert bool(inverted["context"].any(dim=1).all())


@pytest.mark.parametrize("setting", ["shallow", "maple_shallow"])
def test_without_deep_prompts_the_context_learns_from_both(clip, setting):
    for term, last in (("perplexity", False), ("inverse_perplexity", True)):
        found = gradients(clip, setting, term)["context"].any(dim=1)
        assert bool(found[:-1].all()) and bool(found[-1]) is last


def test_a_moved_context_teaches_the_network_that_moves_it(clip):
    """Sanity test (d) holds for the vectors; the network moves all of them."""
    for term, last in (("perplexity", False), ("inverse_perplexity", True)):
        found = gradients(clip, "cocoop", term)
        assert bool(found["context"][-1].any()) is last
        assert bool(found["meta_net.linear2.bias"].any())


@pytest.mark.parametrize(
    ("kind", "count", "n_ctx"), [("conditional", 20, 4), ("class_specific", 40, 3)]
)
def test_more_rows_than_a_chunk(clip, kind, count, n_ctx):
    """Above 64 vectors the op goes through the vocabulary in another way."""
    names = [f"kind {chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(count)]
    torch.manual_seed(0)
    prompts = build_prompts(kind, clip, num_classes=count, n_ctx=n_ctx)
    shake(prompts)
    names = names[:2] if kind == "conditional" else names
    model = PromptedClassifier(clip, prompts, names, "a {}.")
    results = []
    for reference in (False, True):
        frozen = torch.randn(count, 64, generator=torch.Generator().manual_seed(1))
        step = Step(Task(model, "letters"), Batch(torch.zeros(count).long(), frozen=frozen))
        vectors = prompts.context_vectors(step.images if prompts.per_image else None)
        assert vectors.numel() // vectors.shape[-1] > 64
        if reference:
            with reference_only():
                terms = Perplexity()(step)
        else:
            terms = Perplexity()(step)
        parameters = list(prompts.parameters())
        results.append((terms, torch.autograd.grad(sum(terms.values()), parameters)))
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name], atol=1e-5, rtol=1e-5)
    for fused, plain in zip(results[0][1], results[1][1], strict=True):
        scale = float(plain.abs().max())
        torch.testing.assert_close(fused, plain, atol=1e-4 * scale + 1e-8, rtol=1e-4)


def test_what_has_no_words_is_refused(clip):
    for kind in ("visual", "finetune"):
        with pytest.raises(ValueError, match=f"'{kind}' prompts have none"):
            Perplexity().check(Task(make(clip, kind), "letters"))


def test_a_tower_that_is_not_causal_is_refused():
    model = open_clip.model.CustomTextCLIP(
        embed_dim=32, vision_cfg=VISION, text_cfg={**TEXT, "no_causal_mask": True}
    )
    task = Task(make(wrap_clip(model, name="open"), "shared", n_ctx=2), "letters")
    assert len(task.classifier.classnames) == len(NAMES)
    with pytest.raises(ValueError, match=r"needs a causal text tower .*open has none"):
        Perplexity().check(task)
