"""Checkpoints of the authors' models predict here what those models compute."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import vlfast
from tests.checkpoints import lookalikes
from tests.checkpoints.lookalikes import NAMES, make_clip, save
from tests.conftest import squares_dataset
from vlfast.errors import VlfastError

pytestmark = pytest.mark.filterwarnings("ignore:recipe. .* is taken for")


@pytest.fixture(scope="module")
def clip():
    return make_clip()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make(name, clip, **options):
    torch.manual_seed(7)
    return getattr(lookalikes, name)(clip, **options).eval()


def bring_in(file, tmp_path, clip, **options):
    return vlfast.import_checkpoint(
        file, tmp_path / "run", model=clip, data=squares_dataset(), **options
    )


@torch.no_grad()
def logits(classifier, pixels):
    return classifier.predict(classifier.encode_images(pixels))


def assert_alike(found, wanted):
    """Cosines to 1e-5; the logit scale is 1 / 0.07."""
    torch.testing.assert_close(0.07 * found, 0.07 * wanted, atol=1e-5, rtol=0)


# Whose model, its options, those of the import, and what the config must then say.
CASES = {
    "coop": ("CoOp", {}, {}, {"kind": "shared", "n_ctx": 4}),
    "coop_middle": (
        "CoOp",
        {"n_ctx": 5, "position": "middle"},
        {"position": "middle"},
        {"n_ctx": 5, "position": "middle"},
    ),
    "coop_front": ("CoOp", {"position": "front"}, {"position": "front"}, {"position": "front"}),
    "coop_csc": ("CoOp", {"csc": True, "n_ctx": 3}, {}, {"kind": "class_specific", "n_ctx": 3}),
    "coop_csc_front": (
        "CoOp",
        {"csc": True, "position": "front"},
        {"prompts": {"position": "front"}},
        {"kind": "class_specific"},
    ),
    "kgcoop": ("KgCoOp", {}, {}, {"kind": "shared"}),
    "prograd": ("CoOp", {"n_ctx": 16}, {"recipe": "prograd"}, {"n_ctx": 16, "init": None}),
    "kdpl": ("CoOp", {}, {"recipe": "kdpl"}, {"kind": "shared"}),
    "mopd": ("MoPD", {}, {}, {"kind": "shared"}),
    "cocoop": ("CoCoOp", {}, {}, {"kind": "conditional"}),
    "vpt": ("VPT", {}, {}, {"kind": "visual", "n_visual": 3, "visual_depth": 4}),
    "vpt_shallow": ("VPT", {"depth": 1}, {}, {"n_visual": 3, "visual_depth": 1}),
    "kdpl_vpt": ("VPT", {}, {"recipe": "kdpl"}, {"kind": "visual"}),
    "ivlp": (
        "IVLP",
        {},
        {},
        {"n_ctx": 2, "depth": 3, "n_visual": 3, "visual_depth": 4, "init": "a photo of a"},
    ),
    "ivlp_random": ("IVLP", {"words": None}, {}, {"n_ctx": 2, "init": None}),
    "ivlp_language": (
        "IVLP",
        {"n_ctx": 4, "n_visual": 0},
        {},
        {"n_visual": None, "visual_depth": None, "depth": 3},
    ),
    "promptsrc": (
        "PromptSRC",
        {"depth": 2, "visual_depth": 2},
        {},
        {"n_ctx": 4, "depth": 2, "visual_depth": 2},
    ),
    "maple": ("MaPLe", {}, {}, {"kind": "coupled", "n_ctx": 2, "depth": 3}),
    "maple_shallow": ("MaPLe", {"depth": 1}, {}, {"depth": 1}),
    "maple_six": ("MaPLe", {"n_ctx": 6, "words": None}, {}, {"n_ctx": 6, "init": None}),
    "kdpl_maple": ("MaPLe", {}, {"recipe": "kdpl"}, {"kind": "coupled"}),
}


@pytest.mark.parametrize("case", CASES)
def test_imported_run_predicts_what_the_authors_model_computes(case, clip, pixels, tmp_path):
    name, options, given, expected = CASES[case]
    model = make(name, clip, **options)
    run = bring_in(save(model, tmp_path), tmp_path, clip, **given)
    wanted = model.logits(pixels)
    assert wanted.std(dim=1).min() > 1e-2  # or else anything would do
    assert_alike(logits(run.classifier, pixels), wanted)
    assert {key: getattr(run.config.prompts, key) for key in expected} == expected
    assert run.config.recipe.name == (given.get("recipe") or case.split("_")[0])
    assert run.config.recipe.epochs == 5
    again = vlfast.load(run.folder.path, clip=clip)
    assert torch.equal(logits(again.classifier, pixels), logits(run.classifier, pixels))
    assert again.classnames == NAMES


@pytest.mark.parametrize("name", ["CoOp", "CoCoOp", "MaPLe", "PromptSRC"])
@pytest.mark.parametrize("legacy", [False, True])
def test_half_precision_files_in_both_formats(name, legacy, clip, pixels, tmp_path):
    model = make(name, clip)
    run = bring_in(save(model, tmp_path, half=True, legacy=legacy), tmp_path, clip)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim and _is_learned(model, parameter):
                parameter.copy_(parameter.half())
    assert_alike(logits(run.classifier, pixels), model.logits(pixels))
    tensors, _ = run.folder.read_tensors("last")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def _is_learned(model, parameter):
    names = [name for name, own in model.named_parameters() if own is parameter]
    frozen = ("ZS_image", "resblocks", "image_encoder.", "text_encoder.")
    return any("VPT" in name or not any(f in name for f in frozen) for name in names)


def test_promptkd_student_among_its_teachers_class_features(clip, pixels, tmp_path):
    """The teacher is a run that was itself imported, with another CLIP."""
    data = squares_dataset()
    big = make_clip(seed=5, name="glyphs-student")
    teacher = make("PromptSRC", big)
    options = {"model": big, "data": data}
    vlfast.import_checkpoint(save(teacher, tmp_path / "t"), tmp_path / "teacher", **options)
    with torch.no_grad():
        features = teacher.text()
    student = make("PromptKD", clip, features=features)
    file = save(student, tmp_path / "s")
    with pytest.raises(VlfastError, match="there is no teacher: --teacher NAME"):
        bring_in(file, tmp_path, clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlfast.parts.load_clip", lambda *args, **kwargs: big)
        run = bring_in(file, tmp_path, clip, teacher={"run": str(tmp_path / "teacher")})
    wanted = student.logits(pixels)
    assert_alike(logits(run.classifier, pixels), wanted)
    assert run.config.prompts.projector == 2 and run.config.prompts.visual_depth == 3
    again = vlfast.load(run.folder.path, clip=clip)
    assert_alike(logits(again.classifier, pixels), wanted)


def test_imported_run_is_a_run(clip, tmp_path):
    file = save(make("CoOp", clip), tmp_path, epoch=50)
    run = bring_in(file, tmp_path, clip, shots=16)
    path = run.folder.path
    assert set(run.evaluate()) == {"test", "domains"}
    image = squares_dataset().test.image(0)
    assert set(run.predict(image)[0].classnames) == set(NAMES)
    about = json.loads((path / "imported.json").read_text())
    assert about["epoch"] == 50 and about["family"] == "CoOp" and len(about["sha256"]) == 64
    with pytest.raises(VlfastError, match="was imported and has no training state"):
        vlfast.resume(path, clip=clip, dataset=squares_dataset())
    with pytest.raises(FileNotFoundError, match=r"no result\.json, it was imported"):
        _ = run.result
    with pytest.raises(VlfastError, match="holds an imported run; choose another folder"):
        bring_in(file, tmp_path, clip)
    copy = run.save(tmp_path / "copy")
    with pytest.raises(VlfastError, match="was imported"):
        vlfast.resume(copy, clip=clip)


def test_base_classes_alone(clip, pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(lookalikes, "NAMES", NAMES[:3])
    model = make("CoOp", clip)
    file = save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = bring_in(file, tmp_path, clip, classes="base", recipe="coop")
    assert_alike(logits(run.classifier, pixels), model.logits(pixels))
    assert set(run.evaluate()) == {"base", "new", "harmonic_mean", "domains"}
    with pytest.warns(UserWarning, match="trained with 3 classes, and not the 5 of these data"):
        vlfast.import_checkpoint(
            file, tmp_path / "all", model=clip, data=squares_dataset(), recipe="coop"
        )


def test_other_class_names_are_told(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(lookalikes, "NAMES", ("red", "green", "violet", "yellow", "dark grey"))
    wrong = r"of class 2 it has 'violet \.', and these data have 'blue' \(1 of 5 differ\)"
    with pytest.warns(UserWarning, match=wrong):
        bring_in(save(make("CoOp", clip), tmp_path), tmp_path, clip)
    with pytest.raises(VlfastError, match=wrong):
        file = save(make("CoOp", clip, csc=True), tmp_path / "csc")
        vlfast.import_checkpoint(file, tmp_path / "b", model=clip, data=squares_dataset())
    assert not (tmp_path / "b").exists()


def test_recipe_is_the_likeliest_and_can_be_said(clip, tmp_path):
    file = save(make("CoOp", clip), tmp_path)
    with pytest.warns(UserWarning, match="is taken for coop; the files of kgcoop, prograd"):
        bring_in(file, tmp_path, clip)
    with pytest.raises(VlfastError, match="holds prompts of CoOp, which maple does not have"):
        bring_in(file, tmp_path / "b", clip, recipe="maple")


def test_mopd_gate_goes_where_the_pool_is_the_same(clip, tmp_path):
    model = make("MoPD", clip)
    run = bring_in(save(model, tmp_path), tmp_path, clip)
    tensors, _ = run.folder.read_tensors("last")
    assert torch.equal(tensors["objectives.mixture.gate"], model.prompt_learner.gate.detach())
    with pytest.warns(UserWarning, match=r"gate, of shape \[64, 7\], is left out"):
        other = bring_in(save(make("MoPD", clip, prompts=7), tmp_path / "7"), tmp_path / "8", clip)
    assert set(other.folder.read_tensors("last")[0]) == {"context"}


def test_model_and_data_must_be_said(clip, tmp_path):
    file = save(make("CoOp", clip), tmp_path)
    with pytest.raises(VlfastError, match="model: .* does not say which CLIP"):
        vlfast.import_checkpoint(file, tmp_path / "run", data=squares_dataset())
    with pytest.raises(VlfastError, match="data: .* does not say which dataset"):
        vlfast.import_checkpoint(file, tmp_path / "run", model=clip)


def test_another_clip_is_refused(clip, tmp_path):
    coop, maple = save(make("CoOp", clip), tmp_path), save(make("MaPLe", clip), tmp_path)
    vpt = save(make("VPT", clip), tmp_path / "vpt")
    other = make_clip(seed=9, name="other")
    for file in (coop, maple, vpt):
        with pytest.raises(VlfastError, match="was trained on another CLIP than other"):
            bring_in(file, tmp_path, other)

    def wider(state):
        state["ctx"] = torch.randn(4, 64)

    file = save(make("CoOp", clip), tmp_path / "wide", change=wider)
    with pytest.raises(VlfastError, match=r"ctx of .* is \[4, 64\], and small needs \[4, 32\]"):
        bring_in(file, tmp_path, clip)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("MaPLe", lambda s: s.pop("prompt_learner.proj.bias"), r"lacks the tensor .*proj\.bias"),
        (
            "MaPLe",
            lambda s: s.pop("prompt_learner.compound_prompts_text.0"),
            r"no tensor prompt_learner\.compound_prompts_text\.0, though deeper",
        ),
        (
            "VPT",
            lambda s: s.pop("image_encoder.transformer.resblocks.2.VPT_shallow"),
            r"no tensor image_encoder\..*\.2\.VPT_shallow, though deeper",
        ),
        ("IVLP", lambda s: s.pop("image_encoder.VPT"), r"no tensor image_encoder\.VPT, though"),
        ("CoOp", lambda s: s.update(adapter=torch.ones(2)), "CoOp does not have: adapter;"),
        (
            "VPT",
            lambda s: s.update({"image_encoder.adapter.weight": torch.ones(2)}),
            "VPT does not have: image_encoder.adapter.weight",
        ),
        (
            "CoCoOp",
            lambda s: s.update({"meta_net.linear2.weight": torch.ones(32, 9)}),
            r"meta_net\.linear2\.weight of shape \[32, 9\], expected \[32, 4\]",
        ),
        ("CoOp", lambda s: s.update(ctx=torch.full((4, 32), float("nan"))), "not finite"),
        ("CoOp", lambda s: s.update(ctx=torch.ones(4)), r"ctx is \[4\], expected"),
        ("VPT", lambda s: s.update({"image_encoder.VPT": torch.tensor(1.0)}), r"VPT is \[\]"),
        ("CoOp", lambda s: s.update(token_prefix=torch.tensor(1.0)), "token_prefix is not"),
        ("CoOp", lambda s: s.pop("ctx"), "of no method that is known here"),
        ("CoOp", lambda s: s.update(ctx=torch.ones(3, 4, 32)), r"expected \[5, 4, 32\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, change, message, clip, tmp_path):
    file = save(make(name, clip), tmp_path, change=change)
    with pytest.raises(VlfastError, match=message):
        bring_in(file, tmp_path, clip)
    assert not (tmp_path / "run").exists()


def test_deeper_than_the_model(clip, tmp_path):
    def deeper(state):
        state["image_encoder.transformer.resblocks.4.VPT_shallow"] = torch.ones(3, 48)

    file = save(make("VPT", clip), tmp_path, change=deeper)
    with pytest.raises((VlfastError, ValueError), match="visual_depth: expected 1 to 4"):
        bring_in(file, tmp_path, clip)


def test_options_against_the_file_are_refused(clip, tmp_path):
    file = save(make("CoOp", clip), tmp_path)
    with pytest.raises(VlfastError, match=r"prompts\.n_ctx: .* has 4, got 16"):
        bring_in(file, tmp_path, clip, n_ctx=16)
    with pytest.raises(VlfastError, match=r"prompts\.kind: .* has 'shared', got 'coupled'"):
        bring_in(file, tmp_path, clip, prompts="coupled")
