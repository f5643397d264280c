"""PromptKD's two stages on the bundled models: a teacher learns prompts, a student its logits."""

import pytest
import torch
from torch.nn import functional

import vlfast
from tests.trainers.support import PlainDistillation
from vlfast.errors import VlfastError
from vlfast.objectives import KINDS
from vlfast.parts import class_table
from vlfast.trainers.config import Config, build_config

DATA = {"name": "glyphs/tools", "classes": "base"}
OBJECTIVE = {"kind": PlainDistillation.kind, "weight": 1000.0}
STUDENT = {"kind": "hard", "n_ctx": None, "init": None, "projector": 2, "class_features": "teacher"}


@pytest.fixture(scope="module", autouse=True)
def plain_distillation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, PlainDistillation.kind, PlainDistillation)
        yield


def distil(output, data=None, **options):
    """The second stage, on unlabelled images of base and new classes."""
    settings = {
        "prompts": STUDENT,
        "objectives": [OBJECTIVE],
        "data": {**DATA, "shots": 4, "unlabelled": True, **(data or {})},
        "epochs": 3,
        "batch_size": 8,
        "lr": 0.005,
    }
    return vlfast.fit("coop", output=output, show_progress=False, **{**settings, **options})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The first stage: few labelled images of base classes."""
    return vlfast.fit(
        "coop",
        model="glyphs-teacher",
        data={**DATA, "shots": 4},
        output=tmp_path_factory.mktemp("runs") / "teacher",
        epochs=3,
        lr=0.02,
        show_progress=False,
    )


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "student"
    return distil(output, teacher={"run": str(teacher.folder.path)})


def test_student_learns_from_the_teacher(student, teacher):
    rows = student.folder.read_metrics()
    assert rows[-1]["plain_distillation"] < 0.8 * rows[0]["plain_distillation"]
    assert "train_accuracy" not in rows[0]
    accuracy = student.result["accuracy"]
    classes = student.result["data"]["classes"]
    assert classes == len(vlfast.load_dataset(DATA["name"]).classnames)
    assert student.result["data"]["images"]["train"] == 4 * classes
    for part in ("base", "new"):
        assert accuracy[part]["accuracy"] > 5 * 100 / classes
    taught = vlfast.load_dataset(DATA["name"]).classnames
    expected = teacher.classifier.for_classes(taught).class_features()
    torch.testing.assert_close(
        student.classifier.class_features(), functional.normalize(expected, dim=-1)
    )


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_both_checkpoints_need_no_teacher(student, tmp_path, checkpoint):
    copy = student.save(tmp_path / "copy")
    config = (copy / "config.yaml").read_text().replace(str(student.config.teacher.run), "gone")
    (copy / "config.yaml").write_text(config)
    loaded = vlfast.load(copy, checkpoint=checkpoint)
    assert not loaded.classifier.prompts.training
    accuracy = loaded.evaluate()
    if checkpoint == "last":
        assert accuracy == student.result["accuracy"]
    names = vlfast.load_dataset(DATA["name"]).classnames
    image = vlfast.load_dataset(DATA["name"]).test.image(0)
    (found,) = loaded.predict(image, classnames=names[5:9])
    assert set(found.classnames) <= set(names[5:9])
    with pytest.raises(VlfastError, match="for 'cat' it needs the teacher: .*not a run's folder"):
        loaded.predict(image, classnames=["cat", names[0]][:1])


def test_other_names_ask_the_teacher(student, teacher):
    loaded = vlfast.load(student.folder.path)
    image = vlfast.load_dataset(DATA["name"]).test.image(0)
    (found,) = loaded.predict(image, classnames=["cat", "dog"])
    assert set(found.classnames) == {"cat", "dog"}
    asked = loaded.classifier.for_classes(("cat", "dog")).class_features()
    expected = teacher.classifier.for_classes(("cat", "dog")).class_features()
    torch.testing.assert_close(asked, functional.normalize(expected, dim=-1))
    loaded.evaluate("glyphs/shapes")


def test_a_stored_teacher_and_stored_images(student, teacher, tmp_path):
    """The same as from models; all training images, where no number of shots is given."""
    run = {"run": str(teacher.folder.path)}
    data = {"shots": 1, "views": 2, "classes": "new"}
    computed = distil(tmp_path / "computed", data, teacher=run, epochs=2)
    store = vlfast.store_features(
        tmp_path / "store", data={**DATA, **data}, teacher=run, show_progress=False
    )
    stored = {"features": str(store)}
    read = distil(tmp_path / "read", {**data, **stored}, teacher=stored, epochs=2)
    for ours, theirs in zip(
        read.folder.read_metrics(), computed.folder.read_metrics(), strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert read.result["accuracy"] == computed.result["accuracy"]


def test_resumed_with_its_running_statistics(teacher, tmp_path, monkeypatch):
    from tests.trainers.test_fit import Killed, kill_in_epoch

    options = {"data": {"shots": 1, "classes": "new"}, "teacher": {"run": str(teacher.folder.path)}}
    whole = distil(tmp_path / "whole", **options)
    kill_in_epoch(monkeypatch, 3)
    with pytest.raises(Killed):
        distil(tmp_path / "parts", **options)
    monkeypatch.undo()
    parts = vlfast.resume(tmp_path / "parts", show_progress=False)
    ours, theirs = (run.folder.read_tensors("last")[0] for run in (parts, whole))
    assert ours.keys() == theirs.keys() and "projector.1.running_var" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["visual", "independent", "coupled", "finetune"])
def test_prompts_in_the_image_tower_with_a_projector(teacher, tmp_path, kind):
    prompts = {**STUDENT, "kind": kind, "n_visual": 4, "visual_depth": 3}
    if kind in ("independent", "coupled"):
        prompts.update(n_ctx=2, init="an icon of a", depth=2)
    run = distil(
        tmp_path / "run",
        {"shots": 1, "views": 1},
        prompts=prompts,
        teacher={"run": str(teacher.folder.path)},
        epochs=4,
        lr=1e-5 if kind == "finetune" else 5e-3,
    )
    rows = run.folder.read_metrics()
    assert rows[-1]["loss"] < rows[0]["loss"]
    loaded = vlfast.load(run.folder.path)
    assert loaded.evaluate() == run.result["accuracy"]


def test_own_class_features_with_a_projector(tmp_path):
    prompts = {**STUDENT, "class_features": "own"}
    run = distil(
        tmp_path / "run", {"shots": 1}, prompts=prompts, teacher="glyphs-teacher", epochs=1
    )
    assert run.classifier.width == 128
    assert not (run.folder.path / "class_features.safetensors").exists()
    assert vlfast.load(run.folder.path).evaluate() == run.result["accuracy"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 1}, "recipe.batch_size: the projector's batch norm needs at least 2"),
        ({"objectives": [{"kind": "labels"}]}, "data.unlabelled: the labels objective needs"),
        ({"prompts": {**STUDENT, "projector": 7}}, "expected 1 to 3 layers, got 7"),
    ],
)
def test_refusals(tmp_path, options, match):
    with pytest.raises((VlfastError, ValueError), match=match):
        distil(tmp_path / "run", **{"teacher": "glyphs-teacher", **options})
    assert not (tmp_path / "run").exists()


def test_the_teachers_class_features_need_a_teacher():
    config = build_config({"prompts": {"class_features": "teacher"}})
    with pytest.raises(VlfastError, match="prompts.class_features: .* there is no teacher"):
        class_table(config, vlfast.load_dataset(DATA["name"]), None)


def test_defaults_have_no_projector():
    assert Config().prompts.projector is None and Config().prompts.class_features == "own"
