"""Named recipes: a method of a paper as a choice of prompts, objectives and training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlfast.errors import VlfastError, unknown_name
from vlfast.objectives import complete
from vlfast.trainers.config import (
    Config,
    DataConfig,
    build_config,
    check_options,
    expand_shorthand,
    merge_options,
)

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A named method.

    paper: title and arXiv number. equation: where its loss stands. learns: what is trained.
    config: from the data's setting (shots, classes, name) to the config entries it fills.
    """

    name: str
    paper: str
    equation: str
    learns: str
    config: Callable[[DataConfig], Overrides]


def coop_epochs(data: DataConfig) -> int:
    """200 epochs for 8 or 16 shots, 100 for 2 or 4, 50 for 1 ([CoOp] COOP.md, few-shot
    learning)."""
    if data.shots == 1:
        return 50
    return 100 if 2 <= data.shots <= 4 else 200


def _coop(data: DataConfig) -> Overrides:
    """[CoOp] configs/trainers/CoOp: 4 tokens from words where new classes follow (vit_b16_ctxv1),
    16 random ones for few-shot learning."""
    words = data.classes != "all"
    return {
        "prompts": {
            "kind": "shared",
            "n_ctx": None if words else 16,
            "init": "auto" if words else None,
        },
        "objectives": [{"kind": "labels"}],
        "recipe": {"epochs": coop_epochs(data), "batch_size": 32, "lr": 0.002},
    }


def _plpp(data: DataConfig) -> Overrides:
    host = _coop(data)
    return {**host, "objectives": [*host["objectives"], {"kind": "perplexity"}]}


def _zeroshot(data: DataConfig) -> Overrides:
    return {
        "prompts": {"kind": "hard", "n_ctx": None, "init": None},
        "objectives": [{"kind": "labels"}],
        "recipe": {"epochs": 0},
    }


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
            "coop",
            "CoOp, arXiv 2109.01134",
            "section 3.2: cross-entropy with learned context",
            "context vectors in the text tower's input",
            _coop,
        ),
        Recipe(
            "plpp",
            "PLPP, arXiv 2412.15277",
            "CoOp's loss + weight * (perplexity + inverse perplexity) of the context",
            "CoOp's context vectors, kept close to words",
            _plpp,
        ),
    )
}

# Whose optimiser and epochs a kind of prompts brings along when it replaces a recipe's own.
HOST_OF = {"hard": "zeroshot", "shared": "coop", "class_specific": "coop"}


def recipe_config(name: str, data: DataConfig, prompts_kind: str | None = None) -> Overrides:
    """What recipe ``name`` fills in for this setting.

    prompts_kind: replaces the recipe's prompts by another kind, which brings its host's prompts
    and training along; the objectives stay. Raises UnknownNameError for an unknown name.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    filled = RECIPES[name].config(data)
    if prompts_kind is not None and prompts_kind != filled["prompts"]["kind"]:
        if prompts_kind not in HOST_OF:
            raise unknown_name("prompts", prompts_kind, HOST_OF)
        host = RECIPES[HOST_OF[prompts_kind]].config(data)
        filled["prompts"] = {**host["prompts"], "kind": prompts_kind}
        filled["recipe"] = host["recipe"]
        if prompts_kind == "class_specific":
            filled["prompts"].update(n_ctx=16, init=None)
    filled["recipe"] = {"name": name, **filled["recipe"]}
    return filled


def resolve_config(given: Mapping[str, Any]) -> Config:
    """A full Config: what the recipe fills for the setting, then what was given over it.

    given: nested options as Config has them, bare words for sections' names allowed, and two more:
    "objective" (a kind or {kind, ...}) replaces the labels, "add" (one or a list) appends.
    Raises UnknownNameError or VlfastError, naming the option.
    """
    given = expand_shorthand(given)
    objective, added = given.pop("objective", None), given.pop("add", None)
    check_options(given)
    name = given.get("recipe", {}).get("name", "coop")
    data = build_config({"data": given.get("data", {})}).data
    filled = recipe_config(name, data, given.get("prompts", {}).get("kind"))

    objectives = [
        complete(_spec(o)) for o in _listed(given.pop("objectives", filled["objectives"]))
    ]
    if objective is not None:
        objectives = [o for o in objectives if o["kind"] != "labels"]
        objectives.insert(0, _spec(objective))
    if added is not None:
        objectives += [_spec(o) for o in _listed(added)]
    merged = merge_options(filled, given)
    merged["objectives"] = [complete(spec) for spec in objectives]
    kinds = [spec["kind"] for spec in merged["objectives"]]
    if len(set(kinds)) < len(kinds):
        raise VlfastError(f"objectives: expected each kind once, got {', '.join(kinds)}")
    config = build_config(merged)
    _check_values(config)
    return config


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
