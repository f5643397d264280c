"""Named recipes: a method of a paper as a choice of prompts, objectives and training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlfast.clip.models import blocks_of
from vlfast.data.catalog import canonical_name
from vlfast.data.templates import dataset_key
from vlfast.errors import VlfastError, unknown_name
from vlfast.objectives import KINDS, complete
from vlfast.prompts.ensemble import OWN, SELECTED
from vlfast.trainers.config import (
    Config,
    DataConfig,
    ModelConfig,
    Setting,
    build_config,
    check_options,
    expand_shorthand,
    merge_options,
)

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What a recipe's hyperparameters depend on.

    setting: "few-shot", "base-to-new" or "cross-dataset". blocks: how many the text and the image
    tower have. prompts: the kind that was asked for, or None for the recipe's own.
    """

    data: DataConfig
    setting: Setting
    blocks: tuple[int, int]
    prompts: str | None = None

    @property
    def dataset(self) -> str:
        """The dataset's name as the tables here have it, however it is written."""
        return dataset_key(self.data.name.rpartition("/")[2])

    def text_depth(self, depth: int) -> int:
        """``depth`` blocks, or all that the model's text tower has."""
        return min(depth, self.blocks[0])

    def image_depth(self, depth: int) -> int:
        """``depth`` blocks, or all that the model's image tower has; one that takes no tokens says
        so itself, later on."""
        return min(depth, self.blocks[1] or depth)


@dataclass(frozen=True)
class Recipe:
    """A named method.

    paper: title and arXiv number. equation: its loss. learns: what is trained. config: the config
    entries that it fills in a case.
    """

    name: str
    paper: str
    equation: str
    learns: str
    config: Callable[[Case], Overrides]


def setting_of(data: DataConfig, asked: Setting = "auto") -> Setting:
    """Which of the papers' settings this is: base-to-new for a half of the classes, cross-dataset
    for all of ImageNet, else few-shot; or what was asked for."""
    if asked != "auto":
        return asked
    if data.classes != "all":
        return "base-to-new"
    return "cross-dataset" if dataset_key(data.name) == "imagenet" else "few-shot"


def coop_epochs(data: DataConfig) -> int:
    """200 epochs for 8 or 16 shots, 100 for 2 or 4, 50 for 1 and for ImageNet ([CoOp] COOP.md,
    few-shot learning)."""
    if data.shots == 1 or dataset_key(data.name) == "imagenet":
        return 50
    return 100 if 2 <= data.shots <= 4 else 200


def _shared(n_ctx: int | None, init: str | None) -> Overrides:
    return {"kind": "shared", "n_ctx": n_ctx, "init": init}


def _sgd(epochs: int, batch_size: int, lr: float, **options: Any) -> Overrides:
    return {"epochs": epochs, "batch_size": batch_size, "lr": lr, **options}


def _coop(case: Case) -> Overrides:
    """[CoOp] configs/trainers/CoOp: 4 tokens from words where new classes follow (vit_b16_ctxv1),
    16 random ones for few-shot learning."""
    few_shot = case.setting == "few-shot"
    return {
        "prompts": _shared(16, None) if few_shot else _shared(None, "auto"),
        "objectives": [{"kind": "labels"}],
        "recipe": _sgd(coop_epochs(case.data), 32, 0.002),
    }


def _cocoop(case: Case) -> Overrides:
    """[CoOp] configs/trainers/CoCoOp/vit_b16_c4_ep10_batch1_ctxv1."""
    return {
        "prompts": {"kind": "conditional", "n_ctx": None, "init": "auto"},
        "objectives": [{"kind": "labels"}],
        "recipe": _sgd(10, 1, 0.002),
    }


def _kgcoop(case: Case) -> Overrides:
    """[KgCoOp] configs/trainers/KgCoOp/vit_b16_ep100_ctxv1, weight 8 as in its scripts."""
    return {
        "prompts": _shared(None, "auto"),
        "objectives": [{"kind": "labels"}, {"kind": "guidance"}],
        "recipe": _sgd(100, 128, 0.002),
    }


def _prograd(case: Case) -> Overrides:
    """ProGrad in [KgCoOp] trainers/prograd.py: 16 tokens, the template's words the last of them."""
    return {
        "prompts": _shared(16, "template"),
        "objectives": [{"kind": "labels"}],
        "recipe": _sgd(coop_epochs(case.data), 32, 0.002, projection=1.0),
    }


def _vpt(case: Case) -> Overrides:
    """[MaPLe] configs/trainers/VPT/vit_b16_c2_ep5_batch4_4: 8 tokens in 12 blocks."""
    return {
        "prompts": {
            "kind": "visual",
            "n_ctx": None,
            "init": "auto",
            "n_visual": 8,
            "visual_depth": case.image_depth(12),
        },
        "objectives": [{"kind": "labels"}],
        "recipe": _sgd(5, 4, 0.0025),
    }


def _independent(case: Case, tokens: int, depth: int) -> Overrides:
    return {
        "kind": "independent",
        "n_ctx": tokens,
        "init": "auto",
        "depth": case.text_depth(depth),
        "n_visual": tokens,
        "visual_depth": case.image_depth(depth),
    }


def _ivlp(case: Case) -> Overrides:
    """[MaPLe] configs/trainers/IVLP/vit_b16_c2_ep5_batch4_2+2ctx."""
    return {
        "prompts": _independent(case, 2, 12),
        "objectives": [{"kind": "labels"}],
        "recipe": _sgd(5, 4, 0.0035),
    }


def _maple(case: Case) -> Overrides:
    """[MaPLe] configs/trainers/MaPLe: its base-to-new and its cross-dataset config."""
    cross = case.setting == "cross-dataset"
    depth = 3 if cross else 9
    return {
        "prompts": {
            "kind": "coupled",
            "n_ctx": 2,
            "init": "auto",
            "depth": min(case.text_depth(depth), case.image_depth(depth)),
        },
        "objectives": [{"kind": "labels"}],
        "recipe": _sgd(2, 4, 0.0026) if cross else _sgd(5, 4, 0.0035),
    }


def _promptsrc(case: Case) -> Overrides:
    """[PromptSRC] configs/trainers/PromptSRC: base-to-new, cross-dataset and few-shot."""
    epochs, depth, mean, std = {
        "base-to-new": (20, 9, 15.0, 1.0),
        "cross-dataset": (20, 3, 6.0, 10.0),
        "few-shot": (50, 9, 30.0, 30.0),
    }[case.setting]
    # The tiny models never read most words of the 60 templates for photographs.
    templates = "dataset" if case.data.name.startswith("glyphs/") else "imagenet"
    return {
        "prompts": _independent(case, 4, depth),
        "objectives": [{"kind": "labels"}, {"kind": "self_regulation", "templates": templates}],
        "recipe": _sgd(epochs, 4, 0.0025, average_mean=mean, average_std=std),
    }


def _plpp(case: Case) -> Overrides:
    host = _coop(case)
    return {**host, "objectives": [*host["objectives"], {"kind": "perplexity"}]}


def _kdpl(case: Case) -> Overrides:
    """[KDPL] configs/trainers: the hosts' own configs, except that CoOp has 4 tokens and 50 epochs,
    and MaPLe's base-to-new config serves every setting."""
    if case.prompts in (None, "shared"):
        host = {"prompts": _shared(None, "auto"), "recipe": _sgd(50, 32, 0.002)}
    else:
        if case.prompts == "coupled":
            case = replace(case, setting="base-to-new")
        host = host_config(case.prompts, case)
    return {**host, "objectives": [{"kind": "teacher"}]}


# [MoPD] scripts/run.sh: weight of the cross-entropy, of the selection loss, prompts an image,
# epochs. Other datasets get what most of them have.
MOPD = {
    "imagenet": (0.8, 0.0005, 3, 25),
    "caltech101": (0.8, 0.0005, 3, 100),
    "oxfordpets": (0.8, 0.5, 3, 25),
    "stanfordcars": (0.8, 0.1, 3, 100),
    "oxfordflowers": (0.8, 0.1, 3, 100),
    "food101": (0.5, 0.1, 2, 25),
    "fgvcaircraft": (0.8, 0.1, 2, 25),
    "sun397": (0.8, 0.1, 2, 25),
    "describabletextures": (0.8, 0.1, 2, 25),
    "eurosat": (0.5, 0.1, 2, 100),
    "ucf101": (0.5, 0.1, 2, 25),
}
MOPD_ELSEWHERE = (0.8, 0.1, 2, 100)


def _mopd(case: Case) -> Overrides:
    weight, selection_weight, num_prompts, epochs = MOPD.get(case.dataset, MOPD_ELSEWHERE)
    mixture = {
        "kind": "mixture",
        "weight": round(1 - weight, 6),
        "selection_weight": selection_weight,
        "num_prompts": num_prompts,
    }
    return {
        "prompts": _shared(None, "auto"),
        "objectives": [{"kind": "labels", "weight": weight}, mixture],
        "recipe": _sgd(epochs, 128, 0.002),
    }


def _sipd(case: Case) -> Overrides:
    """MoPD with one hard prompt, the dataset's template: there is nothing to select."""
    filled = _mopd(case)
    only = {"selection_weight": 0.0, "num_prompts": 1, "pool_size": 1, "gate": False}
    labels, mixture = filled["objectives"]
    return {**filled, "objectives": [labels, {**mixture, **only}]}


# [PromptKD] scripts/promptkd/base2new_train.sh; all other datasets have 1000.
PROMPTKD_WEIGHT = {"fgvcaircraft": 200.0, "oxfordflowers": 200.0, "describabletextures": 200.0}


def _promptkd(case: Case) -> Overrides:
    """[PromptKD] configs/trainers/PromptKD, the second stage: all training images, no labels."""
    cross = case.setting == "cross-dataset"
    return {
        "data": {"shots": 0, "unlabelled": True},
        "prompts": {
            "kind": "visual",
            "n_ctx": None,
            "init": "auto",
            "n_visual": 4,
            "visual_depth": case.image_depth(3 if cross else 9),
            "projector": 2,
            "class_features": "teacher",
        },
        "objectives": [
            {
                "kind": "teacher",
                "weight": 1000.0 if cross else PROMPTKD_WEIGHT.get(case.dataset, 1000.0),
                "forward_weight": 1.0,
                "reverse_weight": 0.0,
                "scale": "teacher",
                "reduction": "mean",
            }
        ],
        "recipe": _sgd(20, 8, 0.005),
    }


def _zeroshot(case: Case) -> Overrides:
    return {
        "prompts": {"kind": "hard", "n_ctx": None, "init": None},
        "objectives": [{"kind": "labels"}],
        "recipe": {"epochs": 0},
    }


def _zeroshot_ensemble(case: Case) -> Overrides:
    """[CoOp] trainers/zsclip.py, ZeroshotCLIP2: the dataset's own template joins, except on
    ImageNet."""
    templates = list(SELECTED) if case.dataset == "imagenet" else [*SELECTED, OWN]
    filled = _zeroshot(case)
    prompts = {**filled["prompts"], "kind": "ensemble", "templates": templates}
    return {**filled, "prompts": prompts}


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "zeroshot",
            "CLIP, arXiv 2103.00020",
            "section 3.1: class features of the dataset's template",
            "nothing",
            _zeroshot,
        ),
        Recipe(
            "zeroshot-ensemble",
            "CLIP, arXiv 2103.00020",
            "section 3.1.4: mean of the class features of several templates",
            "nothing",
            _zeroshot_ensemble,
        ),
        Recipe(
            "coop",
            "CoOp, arXiv 2109.01134",
            "section 3.2: cross-entropy with learned context",
            "context vectors in the text tower's input",
            _coop,
        ),
        Recipe(
            "cocoop",
            "CoCoOp, arXiv 2203.05557",
            "section 3.2: cross-entropy; the context moves with the image",
            "context vectors, and a small network from image features to a shift of them",
            _cocoop,
        ),
        Recipe(
            "kgcoop",
            "KgCoOp, arXiv 2303.13283",
            "cross-entropy + 8 * (1 - cosine to zero-shot CLIP's class features)",
            "CoOp's context vectors",
            _kgcoop,
        ),
        Recipe(
            "prograd",
            "ProGrad, arXiv 2205.14865",
            "cross-entropy, without the part of its gradient that goes against zero-shot CLIP",
            "CoOp's context vectors",
            _prograd,
        ),
        Recipe(
            "vpt",
            "VPT, arXiv 2203.12119",
            "cross-entropy",
            "tokens in every block of the image tower",
            _vpt,
        ),
        Recipe(
            "ivlp",
            "independent vision-language prompts, in MaPLe, arXiv 2210.03117",
            "cross-entropy",
            "tokens in the blocks of both towers",
            _ivlp,
        ),
        Recipe(
            "maple",
            "MaPLe, arXiv 2210.03117",
            "cross-entropy",
            "tokens in the text tower's blocks, and projections of them into the image tower",
            _maple,
        ),
        Recipe(
            "promptsrc",
            "PromptSRC, arXiv 2307.06948",
            "cross-entropy + 25 * L1(text) + 10 * L1(image) + KL, all to zero-shot CLIP",
            "tokens in the blocks of both towers",
            _promptsrc,
        ),
        Recipe(
            "plpp",
            "PLPP, arXiv 2412.15277",
            "CoOp's loss + weight * (perplexity + inverse perplexity) of the context",
            "CoOp's context vectors, kept close to words",
            _plpp,
        ),
        Recipe(
            "kdpl",
            "KDPL, arXiv 2407.03056",
            "half of each KL divergence between teacher and student; no labels",
            "the prompts of CoOp, or of --prompts cocoop, vpt, maple, ...",
            _kdpl,
        ),
        Recipe(
            "kdpl-ca",
            "KDPL, arXiv 2407.03056",
            "KDPL over the names of a dictionary that the teacher finds most probable",
            "as kdpl, without the class names",
            _kdpl,
        ),
        Recipe(
            "sipd",
            "MoPD, arXiv 2412.19087",
            "w * cross-entropy + (1 - w) * KL to one hard prompt",
            "CoOp's context vectors",
            _sipd,
        ),
        Recipe(
            "mopd",
            "MoPD, arXiv 2412.19087",
            "w * cross-entropy + (1 - w) * gated KL to hard prompts + w2 * selection",
            "CoOp's context vectors, and the gate that selects hard prompts",
            _mopd,
        ),
        Recipe(
            "promptkd",
            "PromptKD, arXiv 2403.02781",
            "weight * KL to a teacher's logits, on unlabelled images, with its class features",
            "tokens in the image tower, and a projector to the teacher's features",
            _promptkd,
        ),
    )
}

# Whose prompts, optimiser and epochs a kind of prompts brings along when it replaces a recipe's.
HOST_OF = {
    "hard": "zeroshot",
    "ensemble": "zeroshot-ensemble",
    "shared": "coop",
    "class_specific": "coop",
    "conditional": "cocoop",
    "visual": "vpt",
    "independent": "ivlp",
    "coupled": "maple",
    "finetune": "promptkd",
}

# `--prompts maple`: the method whose prompts these are.
PROMPTS_OF = {
    "coop": "shared",
    "cocoop": "conditional",
    "vpt": "visual",
    "ivlp": "independent",
    "maple": "coupled",
}


def host_config(kind: str, case: Case) -> Overrides:
    """The prompts of this kind and the training that their own paper gives them.

    Raises UnknownNameError for an unknown kind.
    """
    if kind not in HOST_OF:
        raise unknown_name("prompts", kind, [*HOST_OF, *PROMPTS_OF])
    host = RECIPES[HOST_OF[kind]].config(case)
    prompts = {**host["prompts"], "kind": kind}
    if kind == "class_specific":
        prompts.update(n_ctx=16, init=None)
    if kind == "finetune":
        prompts.update(n_visual=None, visual_depth=None, projector=None, class_features="own")
    return {"prompts": prompts, "recipe": host["recipe"]}


def recipe_config(name: str, case: Case) -> Overrides:
    """What recipe ``name`` fills in.

    Where ``case.prompts`` is another kind than its own, the prompts and the training are that
    kind's; the objectives, ProGrad's projection, and PromptKD's projector and class features stay.
    PromptSRC's averaging goes, since it belongs to its own epochs. Raises UnknownNameError for an
    unknown name.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    filled = RECIPES[name].config(case)
    kind = case.prompts
    if kind is not None and kind != filled["prompts"]["kind"]:
        host = host_config(kind, case)
        of_student = ("projector", "class_features")
        kept = {key: filled["prompts"][key] for key in of_student if key in filled["prompts"]}
        projection = filled["recipe"].get("projection")
        filled["prompts"] = {**host["prompts"], **kept}
        filled["recipe"] = {**host["recipe"], "projection": projection}
        if name == "promptkd":
            filled["recipe"] = RECIPES[name].config(case)["recipe"]
    filled["recipe"] = {"name": name, **filled["recipe"]}
    return filled


def default_teacher(recipe: str, model: ModelConfig) -> Overrides:
    """The teacher where none is named: the larger of the two tiny models for the smaller, and the
    one that KDPL names for its recipes ([KDPL] trainers/kdpl_utils.py); elsewhere there is none."""
    if model.name == "glyphs-student":
        return {"name": "glyphs-teacher"}
    if recipe in ("kdpl", "kdpl-ca"):
        return {"name": "ViT-H-14-quickgelu", "pretrained": "dfn5b"}
    return {}


def resolve_config(given: Mapping[str, Any], blocks: tuple[int, int] | None = None) -> Config:
    """A full Config: what the recipe fills for the setting, then what was given over it.

    given: nested options as Config has them, bare words for sections' names allowed, and two more:
    "objective" (a kind or {kind, ...}) replaces the labels and what there is of its kind, "add"
    (one or a list) appends. The kind of prompts may be named after its method ("maple" for
    "coupled"). blocks: of the text and the image tower, where the model's name does not tell.
    Raises UnknownNameError or VlfastError, naming the option.
    """
    given = expand_shorthand(given)
    objective, added = given.pop("objective", None), given.pop("add", None)
    check_options(given)
    if isinstance(given.get("data", {}).get("name"), str):
        given["data"] = {**given["data"], "name": canonical_name(given["data"]["name"])}
        if given["data"]["name"] == "unlabelled":
            given["data"] = _without_labels(given["data"])
    recipe = given.get("recipe", {})
    name = recipe.get("name", "coop")
    sections = {key: given[key] for key in ("data", "model") if key in given}
    partial = build_config(sections)
    if "kind" in given.get("prompts", {}):
        kind = _prompts_kind(given["prompts"]["kind"])
        given["prompts"] = {**given["prompts"], "kind": kind}
    case = Case(
        partial.data,
        setting_of(partial.data, recipe.get("setting", "auto")),
        blocks or blocks_of(partial.model.name),
        given.get("prompts", {}).get("kind"),
    )
    filled = recipe_config(name, case)

    objectives = [
        complete(_spec(o)) for o in _listed(given.pop("objectives", filled["objectives"]))
    ]
    if objective is not None:
        instead = complete(_spec(objective))
        objectives = [o for o in objectives if o["kind"] not in ("labels", instead["kind"])]
        objectives.insert(0, instead)
    if added is not None:
        objectives += [_spec(o) for o in _listed(added)]
    merged = merge_options(filled, given)
    merged["objectives"] = [complete(spec) for spec in objectives]
    kinds = [spec["kind"] for spec in merged["objectives"]]
    if len(set(kinds)) < len(kinds):
        raise VlfastError(f"objectives: expected each kind once, got {', '.join(kinds)}")
    taught = any(KINDS[kind].needs_teacher for kind in kinds)
    taught = taught or merged["prompts"].get("class_features") == "teacher"
    teacher = merged.get("teacher", {})
    if taught and not any(teacher.get(source) for source in ("name", "run", "features")):
        merged["teacher"] = {**teacher, **default_teacher(name, partial.model)}
    config = build_config(merged)
    _check_values(config)
    check_combination(config)
    return config


def _without_labels(data: Overrides) -> Overrides:
    """The options of images without labels. VlfastError for those that need labels."""
    if data.get("shots"):
        raise VlfastError(
            "data.shots: images without labels can't be drawn by class, all of them are taken: "
            f"leave it out, or give 0, got {data['shots']}"
        )
    if data.get("unlabelled") is False:
        raise VlfastError("data.unlabelled: the images of unlabelled have no labels, got false")
    return {**data, "shots": 0, "unlabelled": True}


def _prompts_kind(name: str) -> str:
    if name == "promptsrc":
        raise VlfastError(
            "prompts: PromptSRC's prompts are of the kind independent, and its self-regulation is "
            "an objective; `--recipe promptsrc` with --objective or --add combines all of it"
        )
    return PROMPTS_OF.get(name, name)


def check_combination(config: Config) -> None:
    """Raise VlfastError for parts that make no sense together, with the reason."""
    prompts = config.prompts
    if prompts.class_features == "teacher":
        if prompts.kind in ("shared", "class_specific", "conditional", "ensemble"):
            raise VlfastError(
                f"prompts: {prompts.kind} prompts change class features only, but here these are "
                "the teacher's (prompts.class_features); take visual, independent, coupled, "
                "finetune, or hard with a projector"
            )
        if prompts.kind == "hard" and prompts.projector is None and config.recipe.epochs:
            raise VlfastError(
                "prompts: hard prompts with the teacher's class features and no prompts.projector "
                "have nothing to learn"
            )
    if prompts.kind == "class_specific" and config.data.unlabelled and config.data.classes != "all":
        raise VlfastError(
            "prompts: class_specific prompts learn from the images of all classes where these are "
            f"unlabelled, and can't be tested on data.classes {config.data.classes!r}; take "
            "data.classes all, or prompts that all classes share"
        )
    if config.recipe.name == "kdpl-ca" and config.data.dictionary is None:
        raise VlfastError(
            "data.dictionary: kdpl-ca learns from the names of a dictionary: give a file with one "
            "name a line"
        )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _spec(objective: Any) -> Any:
    return {"kind": objective} if isinstance(objective, str) else objective


def _check_values(config: Config) -> None:
    recipe, workers = config.recipe, config.data.workers
    for name, value, least in (
        ("recipe.epochs", config.recipe.epochs, 0),
        ("recipe.batch_size", config.recipe.batch_size, 1),
        ("recipe.warmup_epochs", config.recipe.warmup_epochs, 0),
        ("data.shots", config.data.shots, 0),
        ("seed", config.seed, 0),
    ):
        if value < least:
            raise VlfastError(f"{name}: expected at least {least}, got {value}")
    if workers is not None and workers < 0:
        raise VlfastError(f"data.workers: expected at least 0, got {workers}")
    for name, number, zero in (
        ("lr", recipe.lr, False),
        ("momentum", recipe.momentum, True),
        ("weight_decay", recipe.weight_decay, True),
        ("warmup_lr", recipe.warmup_lr, True),
        ("clip_grad_norm", recipe.clip_grad_norm, False),
    ):
        if number is not None and not (0 < number < math.inf or (zero and number == 0)):
            wanted = "at least 0" if zero else "a positive number"
            raise VlfastError(f"recipe.{name}: expected {wanted}, got {number}")
