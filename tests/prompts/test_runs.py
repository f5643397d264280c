"""Every kind of prompts in whole runs: fit, test, load, predict, resume."""

import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image

import vlfast
from tests.conftest import squares_dataset
from tests.prompts.support import WORDS, deep_clip, resnet_clip
from vlfast import run as run_module
from vlfast.clip.words import nearest_words
from vlfast.trainers import fit as fit_module
from vlfast.trainers.config import PromptsConfig
from vlfast.trainers.recipes import resolve_config
from vlfast.trainers.run_folder import RunFolder

KINDS = {
    "conditional": {"n_ctx": None, "init": "auto"},
    "visual": {"init": "auto", "n_visual": 2, "visual_depth": 3},
    "independent": {"n_ctx": 2, "init": WORDS, "depth": 3, "n_visual": 2, "visual_depth": 4},
    "coupled": {"n_ctx": 2, "init": WORDS, "depth": 3},
    "finetune": {},
}


@pytest.fixture(scope="module")
def clip():
    return deep_clip()


def train(clip, output, kind, classes="all", options=None, specs=("labels",), **recipe):
    data = squares_dataset(train=20, val=10, test=20)
    config = resolve_config({"data": {"name": data.name, "shots": 2, "classes": classes}})
    config.output = str(output)
    config.prompts = PromptsConfig(kind=kind, **(options or KINDS[kind]))
    config.objectives = [{"kind": name} for name in specs]
    small = {"epochs": 3, "batch_size": 4, "lr": 0.02, **recipe}
    config.recipe = replace(config.recipe, **small)
    return run_module.train(config, clip=clip, dataset=data, show_progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_run_answers_alike(clip, tmp_path, kind):
    run = train(clip, tmp_path / "run", kind)
    losses = [row["loss"] for row in run.folder.read_metrics()]
    assert len(set(losses)) == 3
    loaded = vlfast.load(run.folder.path, clip=clip)
    picture = Image.new("RGB", (40, 32), (220, 30, 30))
    assert loaded.predict(picture) == run.predict(picture)
    assert loaded.predict(picture, classnames=["cat", "dog"])[0].probabilities[0] >= 0.5
    data = squares_dataset(train=20, val=10, test=20)
    assert loaded.evaluate(data) == run.result["accuracy"]
    vectors = loaded.classifier.prompts.context_vectors()
    if vectors is not None:
        assert len(nearest_words(clip, vectors)) == len(vectors)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_exact(clip, tmp_path, kind, monkeypatch):
    whole = train(clip, tmp_path / "whole", kind)
    original, epochs = fit_module._train_epoch, []

    def killed(*args, **kwargs):
        epochs.append(args)
        if len(epochs) == 3:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(fit_module, "_train_epoch", killed)
    with pytest.raises(Killed):
        train(clip, tmp_path / "parts", kind)
    monkeypatch.undo()
    data = squares_dataset(train=20, val=10, test=20)
    resumed = vlfast.resume(tmp_path / "parts", clip=clip, dataset=data, show_progress=False)
    ours, theirs = (r.folder.read_tensors("last")[0] for r in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("kind", ["conditional", "independent", "coupled"])
def test_with_perplexity_and_new_classes(clip, tmp_path, kind):
    run = train(clip, tmp_path / "run", kind, classes="base", specs=("labels", "perplexity"))
    assert {"base", "new", "harmonic_mean"} <= run.result["accuracy"].keys()
    assert all(row["perplexity"] > 0 for row in run.folder.read_metrics())


def test_a_finetuned_resnet_is_a_run(tmp_path):
    clip = resnet_clip()
    run = train(clip, tmp_path / "run", "finetune", epochs=1)
    loaded = vlfast.load(run.folder.path, clip=clip)
    data = squares_dataset(train=20, val=10, test=20)
    assert loaded.evaluate(data) == run.result["accuracy"]


def test_what_is_recorded_builds_the_same_prompts(clip, tmp_path):
    run = train(clip, tmp_path / "run", "coupled")
    recorded = RunFolder(run.folder.path).read_config().prompts
    assert (recorded.n_ctx, recorded.init, recorded.depth) == (2, WORDS, 3)
    loaded = vlfast.load(run.folder.path, clip=clip).classifier
    assert loaded.prompts.frozen_words == "of a"
    assert loaded.tokens.template == "{ctx} of a {name}."


def test_images_are_encoded_anew_for_each_validation(clip, tmp_path):
    """Features that prompts change are not those of the epoch before."""
    run = train(clip, tmp_path / "run", "visual", epochs=8, lr=0.5)
    assert len({row["val_accuracy"] for row in run.folder.read_metrics()}) > 1


def test_a_template_is_read_where_there_is_one(clip, tmp_path):
    """Fine-tuning has the data's template; visual prompts have their own words."""
    data = squares_dataset(train=5, val=0, test=5)
    for kind, warns in (("finetune", False), ("visual", True)):
        config = resolve_config(
            {"data": {"name": data.name, "shots": 1, "template": "one {} square."}}
        )
        config.output, config.recipe = str(tmp_path / kind), replace(config.recipe, epochs=1)
        config.prompts = PromptsConfig(kind=kind, n_visual=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = run_module.train(config, clip=clip, dataset=data, show_progress=False)
        assert any("data.template" in str(w.message) for w in caught) is warns
        expected = "a photo of a {name}." if warns else "one {name} square."
        assert run.classifier.tokens.template == expected
