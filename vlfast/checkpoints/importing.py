"""From an authors' checkpoint to a run of ours."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlfast.checkpoints.families import GATE, Family, family_of
from vlfast.checkpoints.reading import Checkpoint, checkpoint_file, read_checkpoint
from vlfast.checkpoints.token_buffers import check_model, check_names, frozen_words
from vlfast.clip.models import ClipModel
from vlfast.data.dataset import Dataset
from vlfast.data.templates import template_pool
from vlfast.errors import VlfastError
from vlfast.parts import (
    CLASS_FEATURES,
    check_config,
    class_table,
    load_parts,
    load_teacher,
    prompts_of,
)
from vlfast.prompts import Prompts
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.prompts.projected import ClassTable
from vlfast.run import Run, resolve_given
from vlfast.trainers.config import Config, nest_options
from vlfast.trainers.device import resolve_device
from vlfast.trainers.run_folder import RunFolder
from vlfast.version import __version__

_MISSING = {"model": "CLIP", "data": "dataset"}
_OF_THE_FILE = ("kind", "n_ctx", "depth", "n_visual", "visual_depth", "projector", "class_features")


def import_checkpoint(
    file: str | Path,
    output: str | Path,
    *,
    model: str | Mapping[str, Any] | ClipModel | None = None,
    data: str | Mapping[str, Any] | Dataset | None = None,
    recipe: str | None = None,
    epoch: int | str | None = None,
    **overrides: Any,
) -> Run:
    """Make a run of a checkpoint that the code of CoOp, CoCoOp, KgCoOp, ProGrad, VPT, IVLP, MaPLe,
    PromptSRC, KDPL, MoPD or PromptKD saved.

    file: ``model.pth.tar-EPOCH``, or a folder of such (see ``checkpoint_file``, for ``epoch`` too).
    output: the run's folder. model, data: as in ``vlfast.fit``, and required: the file names
    neither. recipe: whose prompts they are, where several methods save alike; by default the
    likeliest, with a warning. overrides: as in ``vlfast.fit``: ``position=`` where the class name
    is not at the end, ``classes="base"`` for a run on half of the classes, ``teacher=`` with
    PromptKD, whose class features are not in the file. What the shapes say is filled in.

    Only learned tensors are taken, as fp32; the CLIP in the file and the token vectors of its
    classes are left out, but must be those of ``model`` and, for class-specific contexts, of
    ``data``. The run has no result until it is evaluated, and nothing to resume. Raises
    FileNotFoundError, or VlfastError naming the file, the tensor or the option.
    """
    checkpoint = read_checkpoint(checkpoint_file(file, epoch))
    what = f"checkpoint: {checkpoint.file}"
    family = family_of(checkpoint.tensors, what)
    for option, value in (("model", model), ("data", data)):
        if value is None or (isinstance(value, Mapping) and value.get("name") is None):
            raise VlfastError(
                f"{option}: {checkpoint.file} holds prompts of {family.title} and does not say "
                f"which {_MISSING[option]}; give the one it was trained on"
            )
    given = nest_options({**overrides, "output": str(output)})
    given["prompts"] = _prompts_given(given.get("prompts", {}), family, checkpoint)
    given["recipe"] = dict(given.get("recipe", {}))
    if checkpoint.epoch is not None:
        given["recipe"].setdefault("epochs", checkpoint.epoch)
    RunFolder(output).check_free()
    name = _recipe(family, recipe, checkpoint.file)
    config, clip, dataset = resolve_given(name, model, data, given)
    return _make_run(config, clip, dataset, checkpoint, family)


def _recipe(family: Family, asked: str | None, file: Path) -> str:
    if asked is None:
        name, *others = family.recipes
        if others:
            warnings.warn(
                f"recipe: {file} is taken for {name}; the files of {', '.join(others)} have the "
                "same tensors (--recipe says whose it is)",
                stacklevel=3,
            )
        return name
    if asked not in family.recipes:
        raise VlfastError(
            f"recipe: {file} holds prompts of {family.title}, which {asked} does not have; "
            f"expected {' or '.join(family.recipes)}"
        )
    return asked


def _prompts_given(
    given: Mapping[str, Any], family: Family, checkpoint: Checkpoint
) -> dict[str, Any]:
    """Options of the prompts: what the shapes say, with what was given besides."""
    found = family.options(checkpoint.tensors)
    for option in _OF_THE_FILE:
        if option in given and option in found and given[option] != found[option]:
            if option == "kind" and given[option] in family.recipes:
                continue
            raise VlfastError(
                f"prompts.{option}: {checkpoint.file} has {found[option]!r}, got {given[option]!r}"
            )
    return {**found, **{k: v for k, v in given.items() if k != "kind"}}


def _make_run(
    config: Config,
    clip: ClipModel | None,
    dataset: Dataset | None,
    checkpoint: Checkpoint,
    family: Family,
) -> Run:
    check_config(config)
    tensors, what = checkpoint.tensors, f"checkpoint: {checkpoint.file}"
    device = clip.device if clip is not None else resolve_device(config.model.device)
    clip, dataset = load_parts(config, device, clip, dataset)
    if config.data.template is not None:
        dataset = replace(dataset, template=config.data.template)
    _check_widths(tensors, family, clip, checkpoint.file)
    check_model(tensors, family.prefix, clip, str(checkpoint.file))
    _find_words(config, tensors, family, clip, dataset)
    classes = "all" if config.data.unlabelled else config.data.classes
    names = dataset.restrict(classes).classnames

    table = None
    if config.prompts.class_features == "teacher":
        teacher = load_teacher(config, clip, names, dataset.template)
        table = class_table(config, dataset, teacher)
    prompts = prompts_of(config, clip, len(names), table)
    classifier = PromptedClassifier(clip, prompts, names, dataset.template)
    used = _load(prompts, tensors, family, what)
    gate = _gate(tensors, config, clip, dataset)
    unknown = [
        key for key in tensors if key not in used and key != "gate" and not family.frozen(key)
    ]
    if unknown:
        raise VlfastError(
            f"{what} holds tensors that {family.title} does not have: {', '.join(unknown[:5])}"
            f"{', ...' * (len(unknown) > 5)}; it would not predict what it did"
        )
    n_ctx = prompts.num_context
    if n_ctx is not None:
        classifier.tokens.check_fits(n_ctx, clip.text_tower.context_length)
        check_names(
            tensors,
            family.prefix,
            clip,
            names,
            classifier.tokens,
            n_ctx,
            strict=prompts.class_bound,
            what=str(checkpoint.file),
        )
    folder = RunFolder(config.output)
    _write(folder, config, classifier, table, gate, dataset, checkpoint, family)
    return Run(config, classifier, folder, dataset)


def _find_words(
    config: Config,
    tensors: Mapping[str, Tensor],
    family: Family,
    clip: ClipModel,
    dataset: Dataset,
) -> None:
    """Set prompts.init to the words of which some stay frozen, where there are such."""
    options = config.prompts
    asked = dataset.context_init if options.init == "auto" else options.init
    if options.kind in ("independent", "coupled"):
        own = [words for words in (asked, dataset.context_init) if words is not None]
        options.init = frozen_words(tensors, family.prefix, clip, options.n_ctx, own)
    elif options.kind == "visual":
        options.init = asked
    else:
        options.init = None


def _check_widths(
    tensors: Mapping[str, Tensor], family: Family, clip: ClipModel, file: Path
) -> None:
    """Raise VlfastError for vectors that do not have the width of the model's tower."""
    widths = {}
    context, image = family.key("context"), family.key("visual.0")
    if context in tensors:
        widths[context] = clip.text_tower.width
    if image in tensors:
        widths[image] = clip.vision_tower.width
    for key, width in widths.items():
        found = list(tensors[key].shape)
        if found[-1] != width:
            expected = [*found[:-1], width]
            raise VlfastError(
                f"model: {key} of {file} is {found}, and {clip.name} needs {expected}; give the "
                "CLIP that it was trained on"
            )


@torch.no_grad()
def _load(prompts: Prompts, tensors: Mapping[str, Tensor], family: Family, what: str) -> set[str]:
    """Fill the prompts; the keys that were used. Raises VlfastError naming a tensor that is missing
    or has another shape."""
    used = set()
    for name, own in prompts.state_dict().items():
        key = family.key(name)
        if key not in tensors:
            raise VlfastError(f"{what} lacks the tensor {key}, which {family.title} has")
        theirs = tensors[key]
        if theirs.ndim == own.ndim + 2 and theirs.shape[-2:] == (1, 1):
            theirs = theirs.flatten(-3)  # a convolution of one pixel is a linear layer
        if theirs.shape != own.shape:
            raise VlfastError(
                f"{what} has {key} of shape {list(tensors[key].shape)}, expected "
                f"{list(own.shape)} for this model and these data"
            )
        if not bool(theirs.isfinite().all()):
            raise VlfastError(f"{what} has {key} with numbers that are not finite")
        own.copy_(theirs)
        used.add(key)
    return used


def _gate(
    tensors: Mapping[str, Tensor], config: Config, clip: ClipModel, dataset: Dataset
) -> Tensor | None:
    """MoPD's gate, where the run's pool of hard prompts is the one that it was learned for."""
    gate = tensors.get("gate")
    mixture = next((o for o in config.objectives if o["kind"] == "mixture"), None)
    if gate is None or mixture is None:
        return None
    pool = template_pool(mixture["pool"], dataset.name, dataset.template)[: mixture["pool_size"]]
    expected = [clip.width, len(pool)]
    if list(gate.shape) != expected:
        warnings.warn(
            f"checkpoint: the gate, of shape {list(gate.shape)}, is left out, since with the pool "
            f"{mixture['pool']!r} it would be {expected}; predictions do not depend on it",
            stacklevel=4,
        )
        return None
    return gate.float()


def _write(
    folder: RunFolder,
    config: Config,
    classifier: PromptedClassifier,
    table: ClassTable | None,
    gate: Tensor | None,
    dataset: Dataset,
    checkpoint: Checkpoint,
    family: Family,
) -> None:
    features = None if table is None else table.fill(dataset.template)
    learned = dict(classifier.prompts.state_dict())
    if gate is not None:
        learned[GATE] = gate
    about = {"classnames": classifier.classnames, "template": classifier.template}
    if checkpoint.epoch is not None:
        about["epoch"] = checkpoint.epoch
    folder.start(config)
    if features is not None:
        of_table = {"classnames": table.names, "template": table.template}
        folder.write_tensors(CLASS_FEATURES, {"features": features}, of_table)
    folder.write_tensors("last", learned, about)
    folder.write_imported(
        {
            "file": str(checkpoint.file.absolute()),
            "sha256": _sha256(checkpoint.file),
            "family": family.title,
            "epoch": checkpoint.epoch,
            "vlfast": __version__,
        }
    )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
