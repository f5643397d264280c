"""Exported runs load in the authors' models as their load_model does it, and come back the same."""

from __future__ import annotations

import pytest
import torch

import vlfast
from tests.checkpoints import lookalikes
from tests.checkpoints.lookalikes import NAMES, TOKENIZER, make_clip
from tests.conftest import squares_dataset
from vlfast.checkpoints.reading import read_checkpoint
from vlfast.errors import VlfastError

pytestmark = pytest.mark.filterwarnings("ignore:recipe. .* is taken for")


@pytest.fixture(scope="module")
def clip():
    return make_clip()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def train(clip, output, recipe, **options):
    options = {"shots": 2, "epochs": 1, "lr": 0.5, "batch_size": 5, **options}
    options = {"model": clip, "data": squares_dataset(), "show_progress": False, **options}
    return vlfast.fit(recipe, output=output, **options)


def load_as_they_do(model, file):
    """With ``torch.load`` and ``strict=False``, without the token vectors."""
    held = torch.load(file, weights_only=True)
    assert list(held) == ["state_dict", "epoch", "optimizer", "scheduler", "val_result"]
    state = held["state_dict"]
    for name in [n for n in state if n.endswith(("token_prefix", "token_suffix"))]:
        del state[name]
    missing, unexpected = model.saved.load_state_dict(state, strict=False)
    assert not unexpected
    learned = ("ctx", "VPT", "meta_net", "proj.", "compound", "gate")
    towers = ("image_encoder.conv", "resblocks", "ZS_image_encoder")
    lacking = [n for n in missing if any(part in n for part in learned)]
    assert not [n for n in lacking if "VPT" in n or not any(t in n for t in towers)]
    return model.eval()


@torch.no_grad()
def logits(classifier, pixels):
    return classifier.predict(classifier.encode_images(pixels))


# Recipe, its options, the look-alike that must load it, with its options, and its folder.
CASES = {
    "coop": ("coop", {"n_ctx": 4}, "CoOp", {}, "prompt_learner"),
    "coop_middle": (
        "coop",
        {"n_ctx": 5, "position": "middle"},
        "CoOp",
        {"n_ctx": 5, "position": "middle"},
        "prompt_learner",
    ),
    "csc": (
        "coop",
        {"prompts": "class_specific", "n_ctx": 3},
        "CoOp",
        {"csc": True, "n_ctx": 3},
        "prompt_learner",
    ),
    "cocoop": ("cocoop", {}, "CoCoOp", {}, "prompt_learner"),
    "mopd": ("mopd", {}, "MoPD", {}, "prompt_learner"),
    "vpt": (
        "vpt",
        {"n_visual": 3, "visual_depth": 4},
        "VPT",
        {"n": 3, "depth": 4},
        "prompt_learner",
    ),
    "ivlp": (
        "ivlp",
        {"n_ctx": 2, "n_visual": 3, "depth": 3, "visual_depth": 2},
        "IVLP",
        {"n_ctx": 2, "n_visual": 3, "depth": 3, "visual_depth": 2},
        "VLPromptLearner",
    ),
    "promptsrc": (
        "promptsrc",
        {"depth": 2, "visual_depth": 2, "average_mean": 1.0, "average_std": 1.0},
        "PromptSRC",
        {"n_visual": 4, "depth": 2, "visual_depth": 2},
        "VLPromptLearner",
    ),
    "maple": ("maple", {"depth": 3}, "MaPLe", {"depth": 3}, "MultiModalPromptLearner"),
}


@pytest.mark.parametrize("case", CASES)
def test_their_models_load_it_and_it_comes_back_the_same(case, clip, pixels, tmp_path):
    recipe, options, name, theirs, registered = CASES[case]
    run = train(clip, tmp_path / "run", recipe, **options)
    file = vlfast.export_checkpoint(tmp_path / "run", tmp_path / "out", clip=clip)
    assert file == tmp_path / "out" / registered / "model.pth.tar-1"
    assert (file.parent / "checkpoint").read_text() == "model.pth.tar-1\n"
    torch.manual_seed(0)
    model = load_as_they_do(getattr(lookalikes, name)(clip, **theirs), file)
    wanted = logits(run.classifier, pixels)
    torch.testing.assert_close(0.07 * model.logits(pixels), 0.07 * wanted, atol=1e-5, rtol=0)

    position = {"position": options["position"]} if "position" in options else {}
    back = vlfast.import_checkpoint(
        tmp_path / "out",
        tmp_path / "back",
        model=clip,
        data=squares_dataset(),
        recipe=recipe,
        **position,
    )
    first, again = (r.folder.read_tensors("last")[0] for r in (run, back))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert torch.equal(logits(back.classifier, pixels), wanted)
    twice = vlfast.export_checkpoint(tmp_path / "back", tmp_path / "twice", clip=clip)
    one, two = (read_checkpoint(f).tensors for f in (file, twice))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.filterwarnings("ignore")
def test_promptkd_student(clip, pixels, tmp_path):
    teacher = {"run": str(tmp_path / "teacher")}
    big = make_clip(seed=5, name="glyphs-student")
    train(big, tmp_path / "teacher", "zeroshot", epochs=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlfast.parts.load_clip", lambda *args, **kwargs: big)
        run = train(clip, tmp_path / "run", "promptkd", teacher=teacher, visual_depth=3)
        file = vlfast.export_checkpoint(tmp_path / "run", tmp_path / "out", clip=clip)
        back = vlfast.import_checkpoint(
            file,
            tmp_path / "back",
            model=clip,
            data=squares_dataset(),
            teacher=teacher,
        )
    assert file == tmp_path / "out" / "VLPromptLearner" / "model.pth.tar-1"
    features = run.classifier.class_features()
    model = load_as_they_do(lookalikes.PromptKD(clip, features, depth=3), file)
    wanted = logits(run.classifier, pixels)
    torch.testing.assert_close(0.07 * model.logits(pixels), 0.07 * wanted, atol=1e-5, rtol=0)
    first, again = (r.folder.read_tensors("last")[0] for r in (run, back))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert torch.equal(logits(back.classifier, pixels), wanted)


def test_token_vectors_are_those_of_a_prompt_learner(clip, tmp_path):
    train(clip, tmp_path / "run", "coop", n_ctx=4)
    file = vlfast.export_checkpoint(tmp_path / "run", tmp_path / "out", clip=clip)
    state = read_checkpoint(file).tensors
    texts = [f"X X X X {name}." for name in NAMES]
    embedded = clip.token_embedding[TOKENIZER(texts, context_length=24)]
    assert torch.equal(state["token_prefix"], embedded[:, :1])
    assert torch.equal(state["token_suffix"], embedded[:, 5:])


def test_best_goes_where_they_look_for_it(clip, tmp_path):
    train(clip, tmp_path / "run", "coop", n_ctx=2, epochs=2)
    file = vlfast.export_checkpoint(
        tmp_path / "run", tmp_path / "out", checkpoint="best", clip=clip
    )
    assert file.name == "model-best.pth.tar"
    best = vlfast.load(tmp_path / "run", checkpoint="best", clip=clip)
    state = read_checkpoint(file).tensors
    assert torch.equal(state["ctx"], best.classifier.prompts.context)
    with pytest.raises(VlfastError, match="exists already; choose another folder"):
        vlfast.export_checkpoint(tmp_path / "run", tmp_path / "out", checkpoint="best", clip=clip)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("zeroshot", {"epochs": 0}, "hard prompts are in no other method's code"),
        ("zeroshot-ensemble", {"epochs": 0}, "ensemble prompts are in no other"),
        ("coop", {"prompts": "finetune"}, "finetune prompts are in no other"),
    ],
)
def test_prompts_without_a_format_are_refused(recipe, options, message, clip, tmp_path):
    train(clip, tmp_path / "run", recipe, **options)
    with pytest.raises(VlfastError, match=message):
        vlfast.export_checkpoint(tmp_path / "run", tmp_path / "out", clip=clip)
    assert not (tmp_path / "out").exists()


def test_projectors_that_promptkd_does_not_have_are_refused(clip, tmp_path):
    train(clip, tmp_path / "run", "vpt", n_visual=2, visual_depth=2, projector=1)
    with pytest.raises(VlfastError, match="PromptKD's code has visual ones with two layers"):
        vlfast.export_checkpoint(tmp_path / "run", tmp_path / "out", clip=clip)


def test_words_that_vpts_code_does_not_have_are_warned_of(clip, tmp_path):
    train(clip, tmp_path / "run", "vpt", n_visual=2, visual_depth=2, init="an icon of a")
    with pytest.warns(UserWarning, match="always 'a photo of a', and that of this run is 'an icon"):
        vlfast.export_checkpoint(tmp_path / "run", tmp_path / "out", clip=clip)
