"""Recipes fill a config; what is given wins; what makes no sense is refused."""

from dataclasses import asdict

import pytest

from vlfast.errors import UnknownNameError, VlfastError
from vlfast.trainers.config import build_config, nest_options
from vlfast.trainers.recipes import RECIPES, resolve_config


def test_coop_few_shot_is_the_papers():
    config = resolve_config({"recipe": "coop"})
    assert (config.prompts.kind, config.prompts.n_ctx, config.prompts.init) == ("shared", 16, None)
    recipe = asdict(config.recipe)
    assert recipe == {
        "name": "coop",
        "epochs": 200,
        "batch_size": 32,
        "lr": 0.002,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "warmup_epochs": 1,
        "warmup_lr": 1e-5,
        "clip_grad_norm": None,
        "projection": None,
        "average_mean": None,
        "average_std": None,
        "setting": "auto",
    }
    assert [o["kind"] for o in config.objectives] == ["labels"]


@pytest.mark.parametrize(
    ("shots", "epochs"), [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200), (0, 200)]
)
def test_coop_epochs_follow_the_shots(shots, epochs):
    assert resolve_config({"data": {"shots": shots}}).recipe.epochs == epochs


def test_base_classes_start_from_words():
    config = resolve_config({"recipe": "coop", "data": {"classes": "base"}})
    assert (config.prompts.n_ctx, config.prompts.init) == (None, "auto")


def test_plpp_is_coop_and_perplexity():
    plpp, coop = resolve_config({"recipe": "plpp"}), resolve_config({"recipe": "coop"})
    assert plpp.prompts == coop.prompts
    assert plpp.objectives[0] == coop.objectives[0]
    assert plpp.objectives[1] == {
        "kind": "perplexity",
        "weight": 0.1,
        "top_k": 10,
        "temperature": 1.0,
        "inverse_weight": 1.0,
        "detach_targets": True,
    }


def test_what_is_given_wins():
    config = resolve_config(
        {"recipe": {"name": "plpp", "lr": 0.01}, "prompts": {"n_ctx": 8}, "seed": 3}
    )
    assert (config.recipe.lr, config.recipe.epochs) == (0.01, 200)
    assert (config.prompts.n_ctx, config.seed) == (8, 3)


def test_added_objective_makes_coop_into_plpp():
    added = resolve_config({"recipe": "coop", "add": "perplexity"})
    assert added.objectives == resolve_config({"recipe": "plpp"}).objectives
    heavier = resolve_config({"recipe": "coop", "add": [{"kind": "perplexity", "weight": 0.5}]})
    assert heavier.objectives[1]["weight"] == 0.5


def test_objectives_by_name():
    config = resolve_config({"objectives": ["labels", {"kind": "perplexity"}]})
    assert config.objectives == resolve_config({"recipe": "plpp"}).objectives


def test_objective_replaces_the_labels():
    config = resolve_config({"recipe": "coop", "objective": {"kind": "perplexity", "weight": 1.0}})
    assert [o["kind"] for o in config.objectives] == ["perplexity"]


def test_other_prompts_bring_their_training():
    config = resolve_config({"recipe": "zeroshot", "prompts": "class_specific"})
    assert config.recipe.epochs == 200 and config.recipe.name == "zeroshot"
    assert (config.prompts.kind, config.prompts.n_ctx) == ("class_specific", 16)
    hard = resolve_config({"recipe": "coop", "prompts": "hard"})
    assert hard.recipe.epochs == 0


def test_config_goes_through_yaml_unchanged(tmp_path):
    import yaml

    config = resolve_config({"recipe": "plpp", "data": {"classes": "base"}})
    assert build_config(yaml.safe_load(yaml.safe_dump(asdict(config)))) == config


def test_flat_options_find_their_section():
    assert nest_options({"epochs": 3, "n_ctx": 4, "seed": 2, "data": "folder", "shots": 1}) == {
        "recipe": {"epochs": 3},
        "prompts": {"n_ctx": 4},
        "seed": 2,
        "data": {"name": "folder", "shots": 1},
    }
    with pytest.raises(VlfastError, match="name: expected it inside its section"):
        nest_options({"name": "coop"})


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"recipe": "copo"}, UnknownNameError, "unknown recipe 'copo'; did you mean 'coop'"),
        ({"prompts": "share"}, UnknownNameError, "unknown prompts 'share'"),
        (
            {"recipe": {"epoch": 3}},
            UnknownNameError,
            "'recipe.epoch'; did you mean 'recipe.epochs'",
        ),
        ({"modle": "x"}, UnknownNameError, "unknown option 'modle'; did you mean 'model'"),
        ({"recipe": {"epochs": "ten"}}, VlfastError, "recipe.epochs.*int.*ten"),
        ({"data": {"classes": "bas"}}, VlfastError, "data.classes.*'base'.*bas"),
        ({"data": 3}, VlfastError, "data: expected options of DataConfig, got 3"),
        ({"recipe": {"epochs": -1}}, VlfastError, "recipe.epochs: expected at least 0, got -1"),
        ({"recipe": {"lr": 0.0}}, VlfastError, "recipe.lr: expected a positive number"),
        ({"recipe": {"lr": float("nan")}}, VlfastError, "recipe.lr: expected a positive number"),
        ({"recipe": {"momentum": -0.1}}, VlfastError, "recipe.momentum: expected at least 0"),
        ({"recipe": {"clip_grad_norm": 0.0}}, VlfastError, "recipe.clip_grad_norm: expected a pos"),
        ({"data": {"workers": -1}}, VlfastError, "data.workers: expected at least 0"),
        ({"objectives": ["labels", 3]}, VlfastError, "expected a kind or .* got 3"),
        ({"data": {"shots": -2}}, VlfastError, "data.shots: expected at least 0"),
        ({"recipe": "plpp", "add": "perplexity"}, VlfastError, "each kind once"),
        ({"add": "tutor"}, UnknownNameError, "unknown objective 'tutor'"),
    ],
)
def test_bad_config(given, error, match):
    with pytest.raises(error, match=match):
        resolve_config(given)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves_in_every_setting(name):
    for classes in ("all", "base", "new"):
        config = resolve_config({"recipe": name, "data": {"classes": classes}})
        assert config.recipe.name == name
        assert RECIPES[name].paper and RECIPES[name].equation and RECIPES[name].learns
