"""The Python face: fit a recipe, load a run, evaluate it, predict with it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlfast.clip.models import ClipModel, load_clip
from vlfast.data.catalog import load_dataset
from vlfast.data.dataset import Dataset
from vlfast.data.folder import open_image
from vlfast.data.views import image_batch
from vlfast.errors import VlfastError
from vlfast.evaluation.protocols import evaluate_dataset
from vlfast.objectives import build_objectives
from vlfast.ops.backends import reference_only
from vlfast.prompts import build_prompts
from vlfast.trainers.classifier import PromptedClassifier, view_config
from vlfast.trainers.config import Config, expand_shorthand, nest_options
from vlfast.trainers.fit import fit_prompts, make_accelerator
from vlfast.trainers.recipes import resolve_config
from vlfast.trainers.run_folder import CHECKPOINTS, RunFolder, load_learnable
from vlfast.version import __version__


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
    def result(self) -> dict[str, Any]:
        return self.folder.read_result()

    def evaluate(self, data: Dataset | str | None = None) -> dict[str, Any]:
        """Test it: on its own dataset, or on ``data`` (a Dataset or a name).

        A run trained on base classes is tested base-to-new. Percentages; see
        ``vlfast.evaluation.protocols.evaluate_dataset`` for the form.
        """
        if isinstance(data, Dataset):
            dataset = data
        elif data is not None:
            dataset = load_dataset(data, self.config.data.root)
        else:
            dataset = self._dataset or load_dataset(self.config.data.name, self.config.data.root)
            self._dataset = dataset
        classifier = self.classifier
        if data is not None and self.config.data.template is None:
            classifier = replace_template(classifier, dataset.template)
        return evaluate_dataset(
            classifier, dataset, self.config.data.classes, self.config.data.workers
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
        if top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        opened = [i if isinstance(i, Image.Image) else open_image(i) for i in images]
        if not opened:
            return []
        classifier = self.classifier
        if classnames is not None:
            classifier = classifier.for_classes(classnames)
        clip = classifier.clip
        batch = image_batch(opened, view_config(clip)).to(clip.device)
        probabilities = classifier.predict(clip.encode_images(batch)).softmax(dim=1)
        best = probabilities.topk(min(top_k, len(classifier.classnames)), dim=1)
        return [
            Prediction(tuple(classifier.classnames[i] for i in indices), tuple(values))
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def save(self, path: str | Path) -> Path:
        """Copy what ``vlfast.load`` needs (config, checkpoints, result) to another folder."""
        target = RunFolder(path)
        if target.started:
            raise VlfastError(f"path: {target.path} holds a run already; choose another folder")
        target.start(self.config)
        for name in [*(f"{c}.safetensors" for c in CHECKPOINTS), "metrics.jsonl", "result.json"]:
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
    given = nest_options(overrides)
    given["recipe"] = {**given.get("recipe", {}), "name": recipe}
    clip = model if isinstance(model, ClipModel) else None
    dataset = data if isinstance(data, Dataset) else None
    if clip is not None:
        model = {"name": clip.name, "pretrained": clip.pretrained}
    if dataset is not None:
        data = {"name": dataset.name}
    for section, value in expand_shorthand({"model": model, "data": data}).items():
        if value is not None:
            given[section] = {**given.get(section, {}), **value}
    if output is not None:
        given["output"] = str(output)
    config = resolve_config(given)
    return train(config, clip=clip, dataset=dataset, show_progress=show_progress)


def train(
    config: Config,
    *,
    resume: bool = False,
    clip: ClipModel | None = None,
    dataset: Dataset | None = None,
    show_progress: bool = True,
) -> Run:
    """Train and test what a full Config says; ``fit`` and the command line end here."""
    accelerator = make_accelerator(config)
    if clip is None:
        clip = load_clip(config.model.name, config.model.pretrained, device=accelerator.device)
    if dataset is None:
        dataset = load_dataset(config.data.name, config.data.root)
    if config.data.template is not None:
        dataset = replace(dataset, template=config.data.template)
    if config.prompts.init == "auto":
        config.prompts.init = dataset.context_init

    drawn = dataset
    if config.data.shots:
        drawn = drawn.few_shot(config.data.shots, config.seed)
    drawn = drawn.restrict(config.data.classes)

    torch.manual_seed(config.seed)
    prompts = _build_prompts(config, clip, drawn.num_classes)
    classifier = PromptedClassifier(clip, prompts, drawn.classnames, dataset.template)
    _check_fits(classifier)
    objectives = build_objectives(config.objectives)
    for objective in objectives:
        objective.check(clip, prompts)

    folder = RunFolder(config.output or default_output(config))
    if not resume and accelerator.is_main_process:
        folder.start(config)
    accelerator.wait_for_everyone()
    with reference_only() if config.reference else nullcontext():
        fitted = fit_prompts(
            classifier,
            objectives,
            drawn,
            config,
            folder,
            accelerator,
            resume=resume,
            show_progress=show_progress,
        )
        run = Run(config, classifier, folder, dataset)
        accuracy = run.evaluate()
    if accelerator.is_main_process:
        folder.write_result(
            {
                "recipe": config.recipe.name,
                "accuracy": accuracy,
                "epochs": fitted.epochs,
                "best_epoch": fitted.best_epoch,
                "train_seconds": round(fitted.seconds, 3),
                "data": {
                    "name": dataset.name,
                    "fingerprint": drawn.fingerprint(),
                    "classes": drawn.num_classes,
                    "images": {name: len(split) for name, split in drawn.splits().items()},
                },
                "seed": config.seed,
                "device": _device_name(accelerator.device),
                "threads": torch.get_num_threads(),
                "versions": _versions(),
            }
        )
    accelerator.wait_for_everyone()
    return run


def resume(path: str | Path, *, show_progress: bool = True) -> Run:
    """Go on with a run after its last finished epoch; a finished run is only loaded."""
    folder = RunFolder(path)
    config = folder.read_config()
    config.output = str(path)
    if folder.finished:
        return load(path)
    return train(config, resume=True, show_progress=show_progress)


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
    folder = RunFolder(path)
    config = folder.read_config()
    tensors, about = folder.read_tensors(checkpoint)
    if clip is None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        clip = load_clip(config.model.name, config.model.pretrained, device=device)
    prompts = _build_prompts(config, clip, len(about["classnames"]))
    load_learnable(prompts, tensors, folder.path / f"{checkpoint}.safetensors")
    classifier = PromptedClassifier(clip, prompts, about["classnames"], about["template"])
    return Run(config, classifier, folder)


def replace_template(classifier: PromptedClassifier, template: str) -> PromptedClassifier:
    """The same prompts and class names with another dataset's template."""
    return PromptedClassifier(classifier.clip, classifier.prompts, classifier.classnames, template)


def default_output(config: Config) -> Path:
    """runs/DATA/RECIPE-CLASSES-SHOTSshots-seedN."""
    shots = f"{config.data.shots}shots" if config.data.shots else "allshots"
    name = f"{config.recipe.name}-{config.data.classes}-{shots}-seed{config.seed}"
    return Path("runs") / config.data.name.replace("/", "-") / name


def _build_prompts(config: Config, clip: ClipModel, num_classes: int):
    options = asdict(config.prompts)
    return build_prompts(options.pop("kind"), clip, num_classes=num_classes, **options).to(
        clip.device
    )


def _check_fits(classifier: PromptedClassifier) -> None:
    vectors = classifier.prompts.context_vectors()
    n_ctx = 0 if vectors is None else vectors.shape[-2]
    classifier.tokens.check_fits(n_ctx, classifier.clip.text_tower.context_length)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    return {
        "vlfast": __version__,
        "torch": version("torch"),
        "open_clip_torch": version("open_clip_torch"),
        "python": platform.python_version(),
    }
