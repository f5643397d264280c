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
        ({"add": "techer"}, UnknownNameError, "unknown objective 'techer'; did you mean 'teacher'"),
        ({"prompts": "promptsrc"}, VlfastError, "kind independent.*--recipe promptsrc"),
        ({"recipe": "kdpl-ca"}, VlfastError, "data.dictionary: kdpl-ca learns from the names"),
        (
            {"recipe": "promptkd", "prompts": "coop"},
            VlfastError,
            "shared prompts change class features only",
        ),
        (
            {"recipe": "promptkd", "prompts": {"kind": "hard", "projector": None}},
            VlfastError,
            "nothing to learn",
        ),
        (
            {
                "recipe": "promptkd",
                "prompts": {"kind": "class_specific", "class_features": "own", "projector": None},
                "data": {"classes": "base"},
            },
            VlfastError,
            "class_specific prompts learn from the images of all classes.*data.classes 'base'",
        ),
    ],
)
def test_bad_config(given, error, match):
    with pytest.raises(error, match=match):
        resolve_config(given)


def given(recipe, **data):
    if recipe == "kdpl-ca":
        data["dictionary"] = "names.txt"
    return {"recipe": recipe, "data": data, "model": {"name": "ViT-B-16", "pretrained": "openai"}}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves_in_every_setting(name):
    for data in ({"classes": "all"}, {"classes": "base"}, {"classes": "new"}, {"name": "imagenet"}):
        config = resolve_config(given(name, **data))
        assert config.recipe.name == name
        assert RECIPES[name].paper and RECIPES[name].equation and RECIPES[name].learns


# The papers' configs for base-to-new: epochs, batch, learning rate, tokens in the text
# and image tower, blocks.
PAPERS = {
    "coop": (200, 32, 0.002, None, None, 1, None),
    "cocoop": (10, 1, 0.002, None, None, 1, None),
    "kgcoop": (100, 128, 0.002, None, None, 1, None),
    "prograd": (200, 32, 0.002, 16, None, 1, None),
    "vpt": (5, 4, 0.0025, None, 8, 1, 12),
    "ivlp": (5, 4, 0.0035, 2, 2, 12, 12),
    "maple": (5, 4, 0.0035, 2, None, 9, None),
    "promptsrc": (20, 4, 0.0025, 4, 4, 9, 9),
    "plpp": (200, 32, 0.002, None, None, 1, None),
    "kdpl": (50, 32, 0.002, None, None, 1, None),
    "kdpl-ca": (50, 32, 0.002, None, None, 1, None),
    "mopd": (100, 128, 0.002, None, None, 1, None),
    "promptkd": (20, 8, 0.005, None, 4, 1, 9),
}


@pytest.mark.parametrize("name", PAPERS)
def test_base_to_new_is_the_papers(name):
    config = resolve_config(given(name, classes="base"))
    recipe, prompts = config.recipe, config.prompts
    assert PAPERS[name] == (
        recipe.epochs,
        recipe.batch_size,
        recipe.lr,
        prompts.n_ctx,
        prompts.n_visual,
        prompts.depth,
        prompts.visual_depth,
    )


def test_settings_of_promptsrc_and_maple():
    def averaging(**options):
        found = resolve_config({**given("promptsrc"), **options})
        return found.recipe.average_mean, found.recipe.average_std, found.prompts.depth

    assert averaging() == (30.0, 30.0, 9)
    assert averaging(data={"name": "imagenet"}) == (6.0, 10.0, 3)
    assert averaging(recipe={"name": "promptsrc", "setting": "base-to-new"}) == (15.0, 1.0, 9)
    maple = resolve_config(given("maple", name="imagenet"))
    assert (maple.recipe.epochs, maple.recipe.lr, maple.prompts.depth) == (2, 0.0026, 3)


def test_promptkd_takes_all_images_without_labels():
    config = resolve_config(given("promptkd", name="oxford_flowers", classes="base"))
    assert (config.data.shots, config.data.unlabelled) == (0, True)
    assert (config.prompts.projector, config.prompts.class_features) == (2, "teacher")
    (objective,) = config.objectives
    assert (objective["weight"], objective["scale"], objective["reduction"]) == (
        200.0,
        "teacher",
        "mean",
    )
    assert config.teacher.name is None  # the first stage's run
    assert resolve_config(given("promptkd", shots=64)).data.shots == 64


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("mopd", ("oxford_pets", "OxfordPets")),
        ("mopd", ("food101", "Food101", "food-101")),
        ("promptkd", ("dtd", "DescribableTextures")),
        ("promptkd", ("fgvc_aircraft", "FGVCAircraft")),
        ("coop", ("imagenet", "ImageNet")),
        ("promptsrc", ("imagenet", "ImageNet")),
    ],
)
def test_a_dataset_is_known_however_it_is_written(recipe, names):
    """As it is to the templates, which a run takes from the same name."""
    first, *others = (resolve_config(given(recipe, name=name)) for name in names)
    unknown = resolve_config(given(recipe, name="mine"))
    assert (first.objectives, first.recipe) != (unknown.objectives, unknown.recipe)
    for other in others:
        assert (other.objectives, other.recipe) == (first.objectives, first.recipe)


def test_mopd_depends_on_the_dataset():
    def values(name):
        labels, mixture = resolve_config(given("mopd", name=name)).objectives
        return labels["weight"], mixture["weight"], mixture["selection_weight"]

    assert values("eurosat") == (0.5, 0.5, 0.1)
    assert values("oxford_pets") == (0.8, 0.2, 0.5)
    mixture = resolve_config(given("sipd")).objectives[1]
    assert (mixture["pool_size"], mixture["gate"], mixture["selection_weight"]) == (1, False, 0.0)


@pytest.mark.parametrize(
    ("method", "kind", "training"),
    [
        ("coop", "shared", (50, 32, 0.002)),
        ("cocoop", "conditional", (10, 1, 0.002)),
        ("vpt", "visual", (5, 4, 0.0025)),
        ("ivlp", "independent", (5, 4, 0.0035)),
        ("maple", "coupled", (5, 4, 0.0035)),
    ],
)
def test_kdpl_on_the_prompts_of_another_method(method, kind, training):
    """They bring their own optimiser and epochs; MaPLe's base-to-new config serves ImageNet too."""
    config = resolve_config({**given("kdpl", name="imagenet"), "prompts": method})
    assert config.prompts.kind == kind
    assert [o["kind"] for o in config.objectives] == ["teacher"]
    assert (config.recipe.epochs, config.recipe.batch_size, config.recipe.lr) == training


def test_promptsrc_with_kdpl_keeps_its_self_regulation():
    config = resolve_config({**given("promptsrc", classes="base"), "objective": "teacher"})
    assert [o["kind"] for o in config.objectives] == ["teacher", "self_regulation"]
    assert config.recipe.average_mean == 15.0


def test_an_objective_replaces_its_own_kind():
    objective = {"kind": "teacher", "forward_weight": 1.0, "reverse_weight": 0.0}
    (found,) = resolve_config({**given("kdpl"), "objective": objective}).objectives
    assert (found["forward_weight"], found["reverse_weight"]) == (1.0, 0.0)


def test_depth_is_that_of_the_towers():
    config = resolve_config({"recipe": "maple", "model": "glyphs-student"})
    assert (config.prompts.depth, config.teacher.name) == (2, None)
    config = resolve_config({"recipe": "ivlp"}, blocks=(5, 4))
    assert (config.prompts.depth, config.prompts.visual_depth) == (5, 4)


def test_the_small_model_learns_from_the_large_one():
    assert resolve_config({"recipe": "kdpl"}).teacher.name == "glyphs-teacher"
    assert resolve_config(given("kdpl")).teacher.name == "ViT-H-14-quickgelu"
    own = resolve_config({"recipe": "kdpl", "teacher": {"run": "runs/teacher"}})
    assert (own.teacher.name, own.teacher.run) == (None, "runs/teacher")


def test_promptkd_on_other_prompts_keeps_projector_and_training():
    config = resolve_config({**given("promptkd"), "prompts": "finetune"})
    assert (config.prompts.projector, config.prompts.class_features) == (2, "teacher")
    assert (config.recipe.epochs, config.recipe.lr) == (20, 0.005)
