"""The four protocols as grids of runs ([CoOp] COOP.md and COCOOP.md; the papers' settings)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlfast.data.catalog import canonical_name
from vlfast.data.coop.layouts import ELEVEN, IMAGENET_DOMAINS
from vlfast.errors import VlfastError, unknown_name
from vlfast.protocols.cells import Cell, Target
from vlfast.run import method_name
from vlfast.trainers.config import Config, DataConfig, expand_shorthand, merge_options
from vlfast.trainers.recipes import Case, recipe_config, resolve_config

PROTOCOLS = ("few-shot", "base-to-new", "cross-dataset", "domain-generalization")
FEW_SHOTS = (1, 2, 4, 8, 16)
SEEDS = (1, 2, 3)
SOURCE = "imagenet"

# Which hyperparameters a recipe has in a protocol.
_SETTINGS = {
    "few-shot": "few-shot",
    "base-to-new": "base-to-new",
    "cross-dataset": "cross-dataset",
    "domain-generalization": "cross-dataset",
}

# What the grid says, and how it is said.
_OF_THE_GRID = {
    "data.name": "the datasets are given by --datasets",
    "data.classes": "the protocol says which classes are trained on",
    "data.shots": "how many images a class is given by --shots",
    "recipe.name": "the recipes are given by --recipes",
    "seed": "the seeds are given by --seeds",
    "output": "every run has its own folder below the protocol's --output",
}

# What is left of the options for a recipe that trains nothing.
_UNTRAINED_SECTIONS = ("model", "reference")
_UNTRAINED_DATA = ("root", "classnames", "template", "workers", "test_features")


@dataclass(frozen=True)
class Request:
    """What is asked for.

    protocol: one of PROTOCOLS. recipes: their names. datasets: those that are trained and tested
    on, or, in cross-dataset and domain-generalization, that are tested after training on
    ``source``; "glyphs" stands for all icon themes, "all" for the papers' eleven; None for the
    papers' own. shots: None takes the protocol's, and all images for recipes that take all of them.
    options: of ``vlfast train``, nested, for every run; "{dataset}", "{source}", "{seed}" and
    "{shots}" in strings are filled in, a slash in a name becoming a dash.
    """

    protocol: str
    recipes: Sequence[str]
    output: Path
    datasets: Sequence[str] | None = None
    seeds: Sequence[int] = SEEDS
    shots: Sequence[int] | None = None
    source: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def transfers(self) -> bool:
        """Whether runs on a source are tested elsewhere."""
        return self.protocol in ("cross-dataset", "domain-generalization")


def grid(request: Request) -> list[Cell]:
    """Its runs, by dataset, recipe, shots and seed.

    Raises VlfastError, or one of its kind, for options that contradict the protocol, each other or
    the recipes. Nothing is loaded.
    """
    _check(request)
    options = expand_shorthand(request.options)
    cells: list[Cell] = []
    trained, targets = _datasets(request)
    for dataset in trained:
        for recipe in dict.fromkeys(request.recipes):
            if request.transfers and _transductive(recipe, dataset, options):
                runs = [(target, ()) for target in targets or [dataset]]
            else:
                runs = [(dataset, targets)]
            for own, others in runs:
                cells += _of_recipe(request, options, recipe, dataset, own, others, len(cells))
    return _distinct(cells)


def _check(request: Request) -> None:
    if request.protocol not in PROTOCOLS:
        raise unknown_name("protocol", request.protocol, PROTOCOLS)
    for name in ("recipes", "seeds"):
        if not getattr(request, name):
            raise VlfastError(f"--{name}: expected at least one, got none")
    if request.source is not None and not request.transfers:
        raise VlfastError(
            f"--source: {request.protocol} trains on each of --datasets, so it has no source"
        )
    for shots in request.shots or ():
        if shots < 0:
            raise VlfastError(f"--shots: expected at least 0, which is all images, got {shots}")
    options = expand_shorthand(request.options)
    for name, reason in _OF_THE_GRID.items():
        section, _, option = name.rpartition(".")
        if option in (options.get(section, {}) if section else options):
            raise VlfastError(f"--{name}: {reason}")


def _datasets(request: Request) -> tuple[list[str], list[str]]:
    """Which are trained on, and which the runs are tested on besides their own."""
    asked = None if request.datasets is None else _expanded(request.datasets)
    if not request.transfers:
        return asked or list(ELEVEN), []
    source = canonical_name(request.source or SOURCE)
    if asked is None:
        if request.protocol == "cross-dataset":
            asked = list(ELEVEN)
        else:
            asked = list(IMAGENET_DOMAINS) if source == SOURCE else []
    targets = [name for name in asked if name != source]
    if request.protocol == "cross-dataset" and not targets:
        raise VlfastError(f"--datasets: expected others than the source, {source}, to test on")
    return [source], targets


def _expanded(names: Sequence[str]) -> list[str]:
    from vlfast.data.glyphs import THEMES

    found: list[str] = []
    for name in names:
        if name == "all":
            found += ELEVEN
        elif name == "glyphs":
            found += [f"glyphs/{theme}" for theme in THEMES]
        else:
            found.append(canonical_name(name))
    if not found:
        raise VlfastError("--datasets: expected at least one, got none")
    return list(dict.fromkeys(found))


def _own_config(recipe: str, dataset: str) -> dict[str, Any]:
    """What a recipe fills in by itself, as far as the kind of its data and training goes."""
    return recipe_config(recipe, Case(DataConfig(name=dataset), "few-shot", (12, 12)))


def _transductive(recipe: str, dataset: str, options: Mapping[str, Any]) -> bool:
    """Whether it learns from unlabelled images, and so from each target's own (PromptKD)."""
    own = _own_config(recipe, dataset)
    data = {**own.get("data", {}), **options.get("data", {})}
    return own["recipe"]["epochs"] > 0 and bool(data.get("unlabelled"))


def _of_recipe(
    request: Request,
    options: Mapping[str, Any],
    recipe: str,
    source: str,
    dataset: str,
    targets: Sequence[str],
    first: int,
) -> list[Cell]:
    """The cells of a recipe on a dataset, over shots and seeds."""
    own = _own_config(recipe, dataset)
    trains = own["recipe"]["epochs"] > 0
    if trains:
        of_protocol = FEW_SHOTS if request.protocol == "few-shot" else (16,)
        own_shots = own.get("data", {}).get("shots")
        shots = request.shots or (of_protocol if own_shots is None else (own_shots,))
        pairs = [(s, seed) for s in dict.fromkeys(shots) for seed in dict.fromkeys(request.seeds)]
    else:
        pairs = [(0, 1)]
        options = _untrained(options)
    cells: list[Cell] = []
    method = None
    for number, (shots, seed) in enumerate(pairs, first + 1):
        names = {"dataset": dataset, "source": source, "shots": shots, "seed": seed}
        given = merge_options(
            {"recipe": {"setting": _SETTINGS[request.protocol]}}, _filled(options, names)
        )
        classes = "base" if request.protocol == "base-to-new" else "all"
        of_cell = {
            "data": {"name": dataset, "classes": classes, "shots": shots},
            "recipe": {"name": recipe},
            "seed": seed,
        }
        given = merge_options(given, of_cell)
        config = _resolved(given, cells[-1] if cells else None)
        method = method or method_name(config)
        drawn = f"-{f'{shots}shots' if shots else 'allshots'}-seed{seed}" if trains else ""
        cells.append(
            Cell(
                number=number,
                folder=request.output / dataset.replace("/", "-") / f"{method}{drawn}",
                protocol=request.protocol,
                method=method,
                source=source,
                dataset=dataset,
                shots=shots,
                seed=seed,
                given=given,
                config=config,
                targets=tuple(_target(name, options, names) for name in targets),
            )
        )
    return cells


def _resolved(given: dict[str, Any], before: Cell | None) -> Config:
    """What options resolve to. Most cells differ from the one before by the seed alone, which
    nothing else depends on."""
    if before is not None and {**before.given, "seed": given["seed"]} == given:
        return replace(before.config, seed=given["seed"])
    return resolve_config(given)


def _target(name: str, options: Mapping[str, Any], names: Mapping[str, Any]) -> Target:
    data = _filled(options.get("data", {}), {**names, "dataset": name})
    return Target(name, data.get("root"), data.get("classnames"))


def _untrained(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without how prompts, teacher and training are."""
    kept = {name: options[name] for name in _UNTRAINED_SECTIONS if name in options}
    data = {k: v for k, v in options.get("data", {}).items() if k in _UNTRAINED_DATA}
    return {**kept, **({"data": data} if data else {})}


def _filled(value: Any, names: Mapping[str, Any]) -> Any:
    """The same with "{dataset}" and so on in its strings replaced."""
    if isinstance(value, Mapping):
        return {key: _filled(inner, names) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_filled(inner, names) for inner in value]
    if isinstance(value, str):
        for name, word in names.items():
            value = value.replace(f"{{{name}}}", str(word).replace("/", "-"))
    return value


def _distinct(cells: list[Cell]) -> list[Cell]:
    """The cells as they are. VlfastError for two that would share a folder."""
    seen: dict[Path, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.folder, cell)
        if other is not cell:
            raise VlfastError(
                f"--recipes: {other.config.recipe.name} and {cell.config.recipe.name} with these "
                f"options would both be {cell}"
            )
    return cells
