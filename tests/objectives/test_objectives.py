"""Objectives: their values, their gradients, their configs."""

import pytest
import torch
from torch.nn import functional

from vlfast.clip.models import wrap_clip
from vlfast.errors import UnknownNameError, VlfastError
from vlfast.objectives import Batch, Step, Task, build_objectives, complete
from vlfast.objectives.perplexity import Perplexity
from vlfast.prompts import build_prompts
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.fit import TrainingStep

NAMES = ("cat", "yellow school bus", "hen")
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def classifier(clip, kind="shared", **options):
    torch.manual_seed(0)
    options = {"n_ctx": 4, **options}
    prompts = build_prompts(kind, clip, num_classes=len(NAMES), **options)
    return PromptedClassifier(clip, prompts, NAMES, "a {}.")


def step_of(model) -> Step:
    torch.manual_seed(1)
    return Step(Task(model, "letters"), Batch(LABELS, frozen=torch.randn(6, 32)))


def test_labels_are_cross_entropy(tiny_clip):
    step = step_of(classifier(tiny_clip))
    (terms,) = [objective(step) for objective in build_objectives([{"kind": "labels"}])]
    expected = -step.logits.log_softmax(1)[torch.arange(6), step.labels].mean()
    torch.testing.assert_close(terms["labels"], expected)


def test_perplexity_of_words_under_the_tied_head(tiny_clip):
    """Sanity test (a) of PLPP: k = 1 and words to start from give the negative log-likelihood of
    "a photo of a", word by word."""
    model = classifier(tiny_clip, n_ctx=None, init="a photo of a")
    terms = Perplexity(top_k=1, temperature=1e-3)(step_of(model))
    tower = tiny_clip.text_tower
    ids = torch.tensor([tower.tokenizer.sot_token_id, *tower.tokenizer.encode("a photo of a")])
    text = tower.text
    x = text.token_embedding(ids)[None] + text.positional_embedding[:5]
    mask = torch.full((5, 5), float("-inf")).triu(1)
    for block in text.blocks:
        x = block(x, attn_mask=mask)
    scores = text.ln_final(x)[0, :-1] @ text.token_embedding.weight.T
    expected = functional.cross_entropy(scores, ids[1:])
    torch.testing.assert_close(terms["perplexity"], expected, atol=1e-4, rtol=1e-5)


def test_weight_zero_is_coop_to_the_bit(tiny_clip):
    """Sanity test (c) of PLPP."""
    batch = Batch(LABELS, frozen=torch.randn(6, 32))
    gradients = []
    for specs in (
        [{"kind": "labels"}],
        [{"kind": "labels"}, {"kind": "perplexity", "weight": 0.0}],
    ):
        model = classifier(tiny_clip)
        loss, _ = TrainingStep(Task(model, "letters"), build_objectives(specs))(batch)
        loss.backward()
        gradients.append(model.prompts.context.grad)
    assert torch.equal(*gradients)


def test_last_vector_is_regularised_by_the_inverted_term_alone(tiny_clip):
    """Sanity test (d) of PLPP: with detached targets nothing after the last vector is scored."""
    for name, reached in (("perplexity", False), ("inverse_perplexity", True)):
        model = classifier(tiny_clip)
        Perplexity()(step_of(model))[name].backward()
        assert bool(model.prompts.context.grad[-1].abs().sum() > 0) is reached


@pytest.mark.parametrize("kind", ["shared", "class_specific"])
@pytest.mark.parametrize("position", ["end", "middle"])
def test_perplexity_serves_every_context(tiny_clip, kind, position):
    model = classifier(tiny_clip, kind, position=position)
    terms = Perplexity()(step_of(model))
    sum(terms.values()).backward()
    assert all(bool(term.isfinite()) and term.ndim == 0 for term in terms.values())
    assert bool(model.prompts.context.grad.isfinite().all())


def test_class_contexts_average_over_classes(tiny_clip):
    """C equal contexts cost what one shared context costs."""
    shared = classifier(tiny_clip)
    each = classifier(tiny_clip, "class_specific")
    with torch.no_grad():
        each.prompts.context.copy_(shared.prompts.context.expand(len(NAMES), -1, -1))
    for name, value in Perplexity()(step_of(shared)).items():
        torch.testing.assert_close(Perplexity()(step_of(each))[name], value, atol=1e-5, rtol=1e-5)


def test_only_known_words_count(tiny_model):
    known = torch.zeros(49408, dtype=torch.bool)
    known[:50] = True
    clip = wrap_clip(tiny_model, known_tokens=known)
    torch.manual_seed(0)
    prompts = build_prompts("shared", clip, num_classes=3, n_ctx=4)
    with pytest.warns(UserWarning, match="never trained"):
        model = PromptedClassifier(clip, prompts, NAMES, "a {}.")
    objective = Perplexity(top_k=50)
    terms = objective(step_of(model))
    states = step_of(model).text.context_states
    log_p = (states @ clip.token_embedding[:50].T).log_softmax(dim=1)
    cosines = (
        functional.normalize(prompts.context, dim=1)
        @ functional.normalize(clip.token_embedding[:50], dim=1).T
    )
    expected = -(cosines.softmax(dim=1) * log_p).sum(dim=1).mean()
    torch.testing.assert_close(terms["perplexity"], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="top_k=51, expected 1 to 50"):
        Perplexity(top_k=51).check(Task(model, "letters"))


def test_perplexity_refuses_prompts_without_context(tiny_clip):
    model = classifier(tiny_clip, "hard")
    with pytest.raises(ValueError, match="'hard' prompts have none"):
        Perplexity().check(Task(model, "letters"))


def test_config_is_completed():
    assert complete({"kind": "perplexity", "top_k": 5, "weight": 1}) == {
        "kind": "perplexity",
        "weight": 1.0,
        "top_k": 5,
        "temperature": 1.0,
        "inverse_weight": 1.0,
        "detach_targets": True,
    }


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ({"weight": 1.0}, VlfastError, "expected an entry with a kind"),
        ({"kind": "perplexty"}, UnknownNameError, "did you mean 'perplexity'"),
        ({"kind": "labels", "wight": 2.0}, UnknownNameError, "did you mean 'weight'"),
        ({"kind": "perplexity", "top_k": 2.5}, VlfastError, "top_k: expected int, got 2.5"),
        ({"kind": "perplexity", "detach_targets": 1}, VlfastError, "expected bool, got 1"),
    ],
)
def test_bad_config(spec, error, match):
    with pytest.raises(error, match=match):
        complete(spec)


def test_no_objective_is_an_error():
    with pytest.raises(VlfastError, match="at least one"):
        build_objectives([])
