"""KDPL's class-agnostic mode: the names a step learns from, and whole runs."""

import copy
import itertools

import pytest
import torch

import vlfast
from tests.conftest import squares_dataset
from tests.objectives.support import (
    FixedTeacher,
    Plain,
    kl,
    make_batch,
    make_task,
)
from vlfast.clip.models import load_clip
from vlfast.errors import VlfastError
from vlfast.objectives import Candidates, build_objectives
from vlfast.trainers.fit import TrainingStep

# The teacher of the runs is a bundled model, which knows few words; what it says does not matter.
pytestmark = pytest.mark.filterwarnings("ignore:.*never trained the words")

WORDS = ("cat", "school bus", "hen", "red fox", "oak tree", "tea cup", "boat", "old violin", "pen")


def dictionary_task(clip, kind, top_classes):
    candidates = Candidates(top_classes)
    task = make_task(
        clip,
        kind,
        names=WORDS,
        teacher=FixedTeacher(calibration=2.0),
        dataset="",
        labelled=False,
        candidates=candidates,
    )
    return task, candidates


@pytest.mark.parametrize("kind", ["shared", "per_image", "images", "hard"])
def test_losses_and_gradients(tiny_clip, kind):
    """Mean softmax over all names, the K best, both sides softmax anew over them."""
    task, candidates = dictionary_task(tiny_clip, kind, 4)
    objectives = build_objectives([{"kind": "teacher"}])
    for part in (*objectives, candidates):
        part.prepare(task)
    assert task.teacher.asked == [(WORDS, "a photo of a {}.")]
    training = TrainingStep(task, objectives)
    batch = training.look_ahead(make_batch())
    loss, terms = training(batch)
    assert set(terms) == {"teacher"}

    plain = Plain(tiny_clip)
    features = task.teacher.class_features(WORDS).double()
    of_all = plain.scale / 2 * batch.teacher.double() @ features.T
    best = of_all.softmax(1).mean(0).argsort(descending=True)[:4]
    assert sorted(batch.chosen.on_cpu.tolist()) == sorted(best.tolist())
    prompts = copy.deepcopy(task.prompts).double()
    images = plain.images(prompts, batch)
    if kind == "hard":
        classes = plain.hard(WORDS, "a photo of a {}.")
        classes = classes / classes.norm(dim=1, keepdim=True)
    else:
        classes = plain.classes(prompts, WORDS, images)
    logits = plain.scale * (images[:, None] * classes).sum(-1)
    ours, theirs = of_all[:, best], logits[:, best]
    expected = (0.5 * kl(ours, theirs) + 0.5 * kl(theirs, ours)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    if kind != "hard":
        loss.backward()
        expected.backward()
        for one, other in zip(task.prompts.parameters(), prompts.parameters(), strict=True):
            size = float(other.grad.abs().max())
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=2e-4, atol=2e-4 * size)


def test_top_classes_of_two_at_least():
    with pytest.raises(VlfastError, match=r"data\.top_classes: expected at least 2 .*, got 1"):
        Candidates(1)


def fit(clip, tmp_path, names=WORDS, **options):
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    options = {
        "dictionary": str(tmp_path / "names.txt"),
        "top_classes": 4,
        "shots": 4,
        "epochs": 2,
        "n_ctx": 3,
        "lr": 0.1,
        "objective": "teacher",
        "teacher": "glyphs-teacher",
        **options,
    }
    return vlfast.fit(
        "coop",
        model=clip,
        data=squares_dataset(),
        output=tmp_path / "run",
        show_progress=False,
        **{name: value for name, value in options.items() if value is not None},
    )


def test_run(tiny_clip, tmp_path):
    """It learns from the dictionary; validation, test and checkpoint are of the dataset."""
    run = fit(tiny_clip, tmp_path)
    rows = run.folder.read_metrics()
    assert all("val_accuracy" in row and "train_accuracy" not in row for row in rows)
    tensors, about = run.folder.read_tensors("last")
    assert list(tensors) == ["context"]
    assert about["classnames"] == list(squares_dataset().classnames)
    assert run.result["accuracy"]["test"]["images"] == 40
    assert run.folder.read_config().data.dictionary == str(tmp_path / "names.txt")
    again = vlfast.load(tmp_path / "run", clip=tiny_clip)
    assert again.evaluate(squares_dataset()) == run.result["accuracy"]


def test_a_small_dictionary_is_learned_whole(tiny_clip, tmp_path):
    few = fit(tiny_clip, tmp_path, top_classes=1000)
    (tmp_path / "all").mkdir()
    exactly = fit(tiny_clip, tmp_path / "all", top_classes=len(WORDS))
    ours, theirs = (run.folder.read_tensors("last")[0]["context"] for run in (few, exactly))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"objective": "labels"},
            VlfastError,
            "labels are not of its names, and the la",
        ),
        ({"objective": "mixture"}, VlfastError, "and the mixture objective needs labels"),
        ({"prompts": "class_specific"}, VlfastError, "know only the classes they are made for"),
        ({"top_classes": 1}, VlfastError, "data.top_classes: expected at least 2"),
        ({"names": ("cat", "")}, VlfastError, "line 2 of .* is blank"),
        ({"names": ("cat", "very " * 40 + "long")}, ValueError, "n_ctx: 3 context tokens and the"),
    ],
)
def test_refusals_leave_no_run(tiny_clip, tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        fit(tiny_clip, tmp_path, **options)
    assert not (tmp_path / "run").exists()


def test_without_a_teacher(tiny_clip, tmp_path):
    with pytest.raises(VlfastError, match="class-agnostic distillation needs one"):
        fit(tiny_clip, tmp_path, teacher=None)


def test_twenty_thousand_names(tmp_path):
    """The size of KDPL's dictionary, on the models that ship with us."""
    student = load_clip("glyphs-student")
    known = student.known_tokens.nonzero().squeeze(1).tolist()
    words = sorted({student.tokenizer.decode([i]).strip() for i in known})
    words = [w for w in words if len(w) > 2 and w.isalpha() and not student.unknown_words(w)]
    pairs = itertools.islice(itertools.permutations(words[:150], 2), 20_930)
    (tmp_path / "names.txt").write_text("\n".join(map(" ".join, pairs)))
    run = vlfast.fit(
        "coop",
        model={"name": "glyphs-student", "max_memory": "100MB"},
        data={
            "name": "glyphs/nature",
            "shots": 1,
            "dictionary": str(tmp_path / "names.txt"),
            "top_classes": 200,
        },
        teacher="glyphs-teacher",
        objective="teacher",
        output=tmp_path / "run",
        epochs=1,
        n_ctx=4,
        show_progress=False,
    )
    (row,) = run.folder.read_metrics()
    assert row["teacher"] > 0
    assert (tmp_path / "run" / "last.safetensors").stat().st_size < 10_000
