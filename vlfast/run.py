"""The Python face: fit a recipe, load a run, evaluate it, predict with it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlfast.clip.models import ClipModel
from vlfast.data.catalog import load_dataset
from vlfast.data.dataset import Dataset
from vlfast.data.folder import open_image
from vlfast.data.views import image_batch
from vlfast.evaluation.evaluate import evaluate_dataset
from vlfast.evaluation.kept_features import KeptFeatures
from vlfast.evaluation.predictions import ByTest
from vlfast.parts import (
    CLASS_FEATURES,
    load_classifier,
    recorded_dataset,
    replace_template,
)
from vlfast.prompts import tower_blocks
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.config import Config, expand_shorthand, nest_options
from vlfast.trainers.context_history import FILE as CONTEXTS
from vlfast.trainers.fit import OnStep
from vlfast.trainers.images import TEST_BATCH, view_config
from vlfast.trainers.recipes import resolve_config
from vlfast.trainers.run_folder import CHECKPOINTS, IMPORTED, PREDICTIONS, RunFolder
from vlfast.training import plan_training

# What ``save`` copies besides the config.
KEPT = (*CHECKPOINTS, CLASS_FEATURES, CONTEXTS, PREDICTIONS)


@dataclass(frozen=True)
class Prediction:
    """Class names, most probable first, and their probabilities over all class names."""

    classnames: tuple[str, ...]
    probabilities: tuple[float, ...]


class Run:
    """Prompts that were trained (or, for zeroshot, a template), with all that they need to answer.

    ``result`` holds what result.json holds.
    """

    def __init__(
        self,
        config: Config,
        classifier: PromptedClassifier,
        folder: RunFolder,
        dataset: Dataset | None = None,
    ) -> None:
        self.config = config
        self.classifier = classifier
        self.folder = folder
        self._dataset = dataset

    @property
    def classnames(self) -> tuple[str, ...]:
        """The class names it was trained on."""
        return self.classifier.classnames

    @property
    def dataset(self) -> Dataset:
        """What it was trained on, with all its classes; loaded when first asked for."""
        if self._dataset is None:
            self._dataset = recorded_dataset(self.config)
        return self._dataset

    @property
    def result(self) -> dict[str, Any]:
        return self.folder.read_result()

    def evaluate(
        self,
        data: Dataset | str | None = None,
        *,
        root: str | None = None,
        classnames: str | Sequence[str] | None = None,
        predictions: ByTest | None = None,
    ) -> dict[str, Any]:
        """Test it: on its own dataset, or on ``data`` (a Dataset, or a name with its ``root``
        and, where it comes without, ``classnames``: a file, or the names).

        On its own dataset a run trained on base classes is tested base-to-new; on another, with all
        classes (cross-dataset); another folder or table is its own where it has the classes that
        were learned. Percentages; see
        ``vlfast.evaluation.evaluate.evaluate_dataset`` for the form, and for ``predictions``.
        """
        classifier, config = self.classifier, self.config.data
        if data is None:
            dataset = self.dataset
        else:
            dataset = data
            if not isinstance(data, Dataset):
                dataset = load_dataset(data, root or config.root, classnames)
            if dataset.name != config.name and config.template is None:
                classifier = replace_template(classifier, dataset.template)
        own = dataset.name == config.name and set(self.classnames) <= set(dataset.classnames)
        classes = config.classes if own else "all"
        kept = KeptFeatures(config.test_features)
        return evaluate_dataset(
            classifier, dataset, classes, config.workers, kept=kept, predictions=predictions
        )

    def predict(
        self,
        images: str | Path | Image.Image | Sequence[str | Path | Image.Image],
        *,
        classnames: Sequence[str] | None = None,
        top_k: int = 5,
    ) -> list[Prediction]:
        """The ``top_k`` most probable class names of each image (paths or PIL images).

        classnames: choose among these instead of the ones it was trained on. Raises
        FileNotFoundError for a missing file, VlfastError for one that is no image.
        """
        if isinstance(images, (str, Path, Image.Image)):
            images = [images]
        for image in images:
            if not isinstance(image, (str, Path, Image.Image)):
                raise TypeError(f"images: expected paths or PIL images, got {type(image).__name__}")
        if top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        classifier = self.classifier
        if classnames is not None:
            classifier = classifier.for_classes(classnames)
        clip, names = classifier.clip, classifier.classnames
        predictions: list[Prediction] = []
        for start in range(0, len(images), TEST_BATCH):
            opened = [
                image if isinstance(image, Image.Image) else open_image(image)
                for image in images[start : start + TEST_BATCH]
            ]
            batch = image_batch(opened, view_config(clip)).to(clip.device)
            probabilities = classifier.predict(_features(classifier, batch)).softmax(dim=1)
            best = probabilities.topk(min(top_k, len(names)), dim=1)
            predictions += [
                Prediction(tuple(names[i] for i in indices), tuple(values))
                for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        return predictions

    def save(self, path: str | Path) -> Path:
        """Copy what ``vlfast.load`` needs (config, checkpoints, result) to another folder."""
        target = RunFolder(path)
        target.start(self.config)
        tensors = [f"{name}.safetensors" for name in KEPT]
        for name in [*tensors, "metrics.jsonl", "result.json", IMPORTED]:
            if (self.folder.path / name).is_file():
                shutil.copyfile(self.folder.path / name, target.path / name)
        return target.path


def fit(
    recipe: str = "coop",
    *,
    model: str | Mapping[str, Any] | ClipModel | None = None,
    data: str | Mapping[str, Any] | Dataset | None = None,
    output: str | Path | None = None,
    show_progress: bool = True,
    **overrides: Any,
) -> Run:
    """Train a recipe and test it.

    recipe: "zeroshot", "coop", "plpp" (see ``vlfast.trainers.recipes``). model: a name, options
    {name, pretrained, ...}, or a ClipModel that you loaded. data: a name, options {name, shots,
    classes, ...}, or a Dataset of yours. output: the run's folder. overrides: any other option of
    Config, nested (``prompts={"n_ctx": 4}``) or, where its name is clear, flat (``n_ctx=4``,
    ``epochs=10``, ``shots=4``); ``objective=`` replaces the labels and ``add=`` appends.

    Raises VlfastError (or one of its kind) naming the option, what came and what was expected.
    """
    config, clip, dataset = resolve_given(
        recipe, model, data, {**overrides, **({} if output is None else {"output": str(output)})}
    )
    return train(config, clip=clip, dataset=dataset, show_progress=show_progress)


def resolve_given(
    recipe: str,
    model: str | Mapping[str, Any] | ClipModel | None,
    data: str | Mapping[str, Any] | Dataset | None,
    overrides: Mapping[str, Any],
) -> tuple[Config, ClipModel | None, Dataset | None]:
    """What ``fit`` was given as a full Config, and the model and the dataset that came as such."""
    given = nest_options(overrides)
    given["recipe"] = {**given.get("recipe", {}), "name": recipe}
    clip = model if isinstance(model, ClipModel) else None
    dataset = data if isinstance(data, Dataset) else None
    if clip is not None:
        model = {"name": clip.name, "pretrained": clip.pretrained}
    if dataset is not None:
        data = {"name": dataset.name}
        if not dataset.labelled:
            of_data = given.get("data", {})
            data |= {"shots": of_data.get("shots", 0), "unlabelled": True}
    for section, value in expand_shorthand({"model": model, "data": data}).items():
        if value is not None:
            given[section] = {**given.get(section, {}), **value}
    blocks = None if clip is None else tower_blocks(clip)
    return resolve_config(given, blocks), clip, dataset


def train(
    config: Config,
    *,
    resume: bool = False,
    clip: ClipModel | None = None,
    dataset: Dataset | None = None,
    show_progress: bool = True,
    on_step: OnStep | None = None,
) -> Run:
    """Train and test what a full Config says; ``fit`` and the command line end here.

    on_step: called after each training step, see ``fit_prompts``.
    """
    config = copy.deepcopy(config)
    config.output = str(config.output or default_output(config))
    plan = plan_training(config, resume=resume, clip=clip, dataset=dataset)
    plan.carry_out(resume=resume, show_progress=show_progress, on_step=on_step)
    return Run(config, plan.classifier, plan.folder, plan.dataset)


def resume(
    path: str | Path,
    *,
    clip: ClipModel | None = None,
    dataset: Dataset | None = None,
    show_progress: bool = True,
) -> Run:
    """Go on with a run after its last finished epoch; a finished run is only loaded.

    clip, dataset: those of a run that was trained on your own. Raises VlfastError for an imported
    run.
    """
    folder = RunFolder(path)
    folder.check_resumable()
    config = folder.read_config()
    config.output = str(path)
    if folder.finished:
        run = load(path, clip=clip)
        return Run(run.config, run.classifier, run.folder, dataset)
    return train(config, resume=True, clip=clip, dataset=dataset, show_progress=show_progress)


def load(
    path: str | Path,
    *,
    checkpoint: str = "last",
    device: str = "auto",
    clip: ClipModel | None = None,
) -> Run:
    """A trained run from its folder. The dataset is not needed until ``evaluate``.

    checkpoint: "last", or "best" on the validation split. clip: a ClipModel that you loaded, for
    a run that was trained with one. Raises FileNotFoundError for a missing folder or checkpoint,
    VlfastError for a damaged one.
    """
    if checkpoint not in CHECKPOINTS:
        raise ValueError(f"checkpoint: expected 'last' or 'best', got {checkpoint!r}")
    config, classifier = load_classifier(path, checkpoint, device, clip)
    return Run(config, classifier, RunFolder(path))


def default_output(config: Config) -> Path:
    """runs/DATA/MODEL/METHOD-CLASSES-SHOTSshots-seedN."""
    shots = f"{config.data.shots}shots" if config.data.shots else "allshots"
    parts = [method_name(config), config.data.classes, shots, f"seed{config.seed}"]
    model = Path(config.model.name).stem
    return Path("runs") / config.data.name.replace("/", "-") / model / "-".join(parts)


def method_name(config: Config) -> str:
    """The recipe's name, with "-PROMPTS" and "-OBJECTIVES" where they are not the recipe's own:
    "kdpl-coupled", "promptsrc-teacher+self_regulation"."""
    own = resolve_config({"recipe": config.recipe.name, "data": asdict(config.data)})
    parts = [config.recipe.name]
    if config.prompts.kind != own.prompts.kind:
        parts.append(config.prompts.kind)
    kinds = [objective["kind"] for objective in config.objectives]
    if kinds != [objective["kind"] for objective in own.objectives]:
        parts.append("+".join(kinds))
    return "-".join(parts)


@torch.no_grad()
def _features(classifier: PromptedClassifier, pixels: Tensor) -> Tensor:
    return classifier.encode_images(pixels)
