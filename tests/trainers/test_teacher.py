"""Teachers: a model, another run, stored features."""

import pytest
import torch
from torch.nn import functional

import vlfast
from tests.trainers.support import PlainDistillation
from vlfast.clip.models import load_clip
from vlfast.errors import UnknownNameError, VlfastError
from vlfast.objectives import KINDS
from vlfast.parts import load_teacher
from vlfast.prompts import ClassContext, HardPrompt, SharedContext
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.config import TeacherConfig, build_config
from vlfast.trainers.teacher import ModelTeacher, check_teacher

DATA = {"name": "glyphs/tools", "shots": 2}
NAMES = ("hammer", "key", "pen")
OPTIONS = {"epochs": 2, "batch_size": 32, "lr": 0.05, "n_ctx": 3, "init": None}


@pytest.fixture(autouse=True)
def plain_distillation(monkeypatch):
    monkeypatch.setitem(KINDS, PlainDistillation.kind, PlainDistillation)


def distil(output, data=None, **options):
    options = {**OPTIONS, "objective": {"kind": PlainDistillation.kind, "weight": 10.0}, **options}
    return vlfast.fit(
        "coop", data={**DATA, **(data or {})}, output=output, show_progress=False, **options
    )


@pytest.fixture(scope="module")
def teaching_run(tmp_path_factory):
    """CoOp on the larger model."""
    return vlfast.fit(
        "coop",
        model="glyphs-teacher",
        data=DATA,
        output=tmp_path_factory.mktemp("runs") / "teacher",
        show_progress=False,
        **OPTIONS,
    )


@pytest.fixture(scope="module")
def stores(tmp_path_factory, teaching_run):
    """Stored features with a model for a teacher, and with a run."""
    folder = tmp_path_factory.mktemp("stores")
    teachers = {"model": {"name": "glyphs-teacher"}, "run": {"run": str(teaching_run.folder.path)}}
    data = {**DATA, "views": 2}
    return {
        kind: vlfast.store_features(folder / kind, data=data, teacher=of, show_progress=False)
        for kind, of in teachers.items()
    }


def losses(run):
    return [row["loss"] for row in run.folder.read_metrics()]


def test_a_teacher_of_another_size_and_normalisation(tiny_clip):
    """The student's views, [32 x 32] in CLIP's normalisation, as the teacher wants them."""
    clip = load_clip("glyphs-teacher")
    teacher = ModelTeacher(
        PromptedClassifier(clip, HardPrompt(), NAMES, "a {}."), tiny_clip, calibration=2.0
    )
    torch.manual_seed(0)
    raw = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (tiny_clip.mean, tiny_clip.std))
    found = teacher.encode_images((raw - mean) / std)
    resized = functional.interpolate(raw, size=(48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        found, clip.encode_images((resized - 0.5) / 0.25), rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(teacher.logit_scale, clip.logit_scale / 2)
    assert teacher.width == found.shape[1] == 192
    same = ModelTeacher(teacher.classifier, load_clip("glyphs-student"))
    pixels = torch.randn(2, 3, 48, 48)
    assert torch.equal(same.encode_images(pixels), clip.encode_images(pixels))


def test_width_without_encoding(tiny_clip, monkeypatch):
    classifier = PromptedClassifier(tiny_clip, HardPrompt(), NAMES, "a {}.")
    monkeypatch.setattr(HardPrompt, "encode", lambda *_, **__: pytest.fail("encoded"))
    assert ModelTeacher(classifier, tiny_clip).width == 32


def test_another_template_for_hard_prompts_alone(tiny_clip):
    hard = ModelTeacher(PromptedClassifier(tiny_clip, HardPrompt(), NAMES, "a {}."), tiny_clip)
    other = hard.class_features(NAMES, "the {} again.")
    assert not torch.allclose(other, hard.class_features(NAMES), atol=1e-3)
    expected = PromptedClassifier(tiny_clip, HardPrompt(), NAMES, "the {} again.").class_features()
    torch.testing.assert_close(other, functional.normalize(expected, dim=-1))
    torch.manual_seed(0)
    learned = SharedContext(tiny_clip, n_ctx=2)
    learned = ModelTeacher(PromptedClassifier(tiny_clip, learned, NAMES, "a {}."), tiny_clip)
    assert torch.equal(
        learned.class_features(NAMES, "the {} again."), learned.class_features(NAMES)
    )
    assert learned.template is None and hard.template == "a {}."


def test_a_run_teaches_what_it_has_learned(teaching_run, tmp_path):
    path = str(teaching_run.folder.path)
    config = build_config({"teacher": {"run": path, "calibration": 2.0}})
    student = load_clip("glyphs-student")
    teacher = load_teacher(config, student, NAMES, "an icon of a {}.")
    own = teaching_run.classifier
    expected = functional.normalize(own.for_classes(NAMES).class_features(), dim=-1)
    torch.testing.assert_close(teacher.class_features(NAMES), expected)
    assert not any(p.requires_grad for p in teacher.classifier.prompts.parameters())
    torch.testing.assert_close(teacher.logit_scale, own.clip.logit_scale / 2)
    options = {"epochs": 4, "batch_size": 8}
    run = distil(
        tmp_path / "run", {"views": 1, "classes": "base"}, teacher={"run": path}, **options
    )
    assert losses(run)[-1] < losses(run)[0]
    assert run.folder.read_config().teacher.run == path


def test_stored_teachers_teach_alike(stores, teaching_run, tmp_path):
    """A model or a run, in every step; only the teacher stored; teacher and student stored."""
    models = {"model": {"name": "glyphs-teacher"}, "run": {"run": str(teaching_run.folder.path)}}
    base = {"views": 2, "classes": "new"}
    for kind, path in stores.items():
        computed = distil(tmp_path / kind / "computed", base, teacher=models[kind])
        for name, data, teacher in (
            ("teacher", {}, {"features": str(path)}),
            ("both", {"features": str(path)}, {"features": str(path)}),
            ("model there", {"features": str(path)}, models[kind]),
        )[(kind == "run") :]:
            read = distil(tmp_path / kind / name, {**base, **data}, teacher=teacher)
            assert losses(read) == pytest.approx(losses(computed), rel=1e-5), name
            assert read.result["accuracy"] == computed.result["accuracy"]


def test_calibration_of_a_stored_teacher(stores, tmp_path):
    teacher = {"features": str(stores["model"]), "calibration": 3.0}
    student = load_clip("glyphs-student")
    config = build_config({"teacher": teacher})
    names = vlfast.load_dataset("glyphs/tools").classnames
    found = load_teacher(config, student, names, "")
    large = load_clip("glyphs-teacher")
    torch.testing.assert_close(found.logit_scale, large.logit_scale / 3)
    assert found.width == 192 and found.class_features(names[3:5]).shape == (2, 192)
    assert found.class_features(names, "an icon of a {}.").shape[0] == len(names)
    with pytest.raises(VlfastError, match=r"of the text 'an icon of a \{\}\.', got 'a \{\}'"):
        found.class_features(names, "a {}")
    with pytest.raises(VlfastError, match=r"classes, not of 'whale'"):
        found.class_features(["whale", names[0]])
    with pytest.raises(VlfastError, match="no model to encode others with"):
        found.encode_images(torch.zeros(1, 3, 48, 48))


@pytest.mark.parametrize(
    ("data", "teacher", "match"),
    [
        ({"shots": 1}, "features", r"teacher\.features: .*data shots is 2 there, 1 here"),
        ({}, "seed", r"teacher\.features: .*data seed is 1 there, 2 here"),
        ({"features": True}, "run", r"data\.features: .*teacher weights is .* there"),
        ({"name": "glyphs/nature"}, "features", r"teacher\.features: .*classes, not of"),
    ],
)
def test_another_runs_stored_teacher(stores, teaching_run, tmp_path, data, teacher, match):
    data = {k: str(stores["model"]) if k == "features" else v for k, v in data.items()}
    options = {"seed": 2} if teacher == "seed" else {}
    run = {"run": str(teaching_run.folder.path)}
    teacher = run if teacher == "run" else {"features": str(stores["model"])}
    with pytest.raises(VlfastError, match=match):
        distil(tmp_path / "run", data, teacher=teacher, **options)
    assert not (tmp_path / "run").exists()


def test_a_store_without_a_teacher(tmp_path):
    path = vlfast.store_features(tmp_path / "store", data={**DATA, "views": 1}, show_progress=False)
    with pytest.raises(VlfastError, match=r"teacher\.features: .* holds no features of a teacher"):
        distil(tmp_path / "run", teacher={"features": str(path)})
    new = {"views": 1, "classes": "new"}
    computed = distil(tmp_path / "computed", new, teacher="glyphs-teacher")
    mixed = distil(tmp_path / "mixed", {**new, "features": str(path)}, teacher="glyphs-teacher")
    assert losses(mixed) == pytest.approx(losses(computed), rel=1e-5)
    with pytest.raises(VlfastError, match="was made without a teacher"):
        vlfast.store_features(
            path, data={**DATA, "views": 1}, teacher="glyphs-teacher", show_progress=False
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": "a", "run": "b"}, "one of name, run and features, got teacher.name, teacher.run"),
        ({"name": "a", "features": "b"}, "got teacher.name, teacher.features"),
        ({"pretrained": "openai"}, "teacher.pretrained: expected with teacher.name"),
        ({"name": "a", "template": "no place"}, "teacher.template: expected exactly one {}"),
        ({"name": "a", "calibration": 0.0}, "teacher.calibration: expected above 0, got 0.0"),
        ({"name": "a", "calibration": float("nan")}, "teacher.calibration: expected above 0"),
        ({"name": "a", "calibration": float("inf")}, "teacher.calibration: expected above 0"),
    ],
)
def test_options_that_make_no_sense(options, match):
    with pytest.raises(VlfastError, match=match):
        check_teacher(TeacherConfig(**options))


@pytest.mark.parametrize(
    ("teacher", "error", "match"),
    [
        ({"name": "glyphs-teecher"}, UnknownNameError, "did you mean 'glyphs-teacher'"),
        ({"run": "gone"}, FileNotFoundError, "teacher.run: .*gone is not a run's folder"),
        ({"features": "gone"}, FileNotFoundError, "teacher.features: .*gone is no folder"),
        ({"name": "glyphs-teacher", "run": "x"}, VlfastError, "expected one of name, run"),
    ],
)
def test_teachers_that_are_not_there(tmp_path, teacher, error, match):
    with pytest.raises(error, match=match):
        distil(tmp_path / "run", teacher=teacher)
    assert not (tmp_path / "run").exists()


def test_runs_that_can_not_teach(tiny_clip, teaching_run, tmp_path):
    path = str(teaching_run.folder.path)
    with pytest.raises(VlfastError, match="teacher.template: .* learned shared prompts instead"):
        distil(tmp_path / "run", teacher={"run": path, "template": "a {}."})
    bound = vlfast.fit(
        "coop",
        model="glyphs-teacher",
        data={**DATA, "classes": "base"},
        prompts={"kind": "class_specific", "n_ctx": 2, "init": None},
        output=tmp_path / "bound",
        epochs=1,
        show_progress=False,
    )
    teacher = {"run": str(bound.folder.path)}
    with pytest.raises(VlfastError, match="teacher.run: .* class_specific prompts know only the"):
        distil(tmp_path / "run", teacher=teacher)
    assert losses(distil(tmp_path / "same", {"classes": "base"}, teacher=teacher))
    torch.manual_seed(0)
    per_image = ClassContext(tiny_clip, num_classes=3, n_ctx=2)
    per_image.per_image = True
    with pytest.raises(VlfastError, match="every image class features of its own"):
        ModelTeacher(PromptedClassifier(tiny_clip, per_image, NAMES, "a {}."), tiny_clip)


def test_a_damaged_run(teaching_run, tmp_path):
    copy = teaching_run.save(tmp_path / "copy")
    (copy / "last.safetensors").write_bytes(b"nothing")
    with pytest.raises(VlfastError, match=r"last\.safetensors is truncated"):
        distil(tmp_path / "run", teacher={"run": str(copy)})
