"""The Python face: fit a recipe, load a run, evaluate it, predict with it."""

from __future__ import annotations

import copy
import platform
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from vlfast.clip.models import ClipModel
from vlfast.data.catalog import load_dataset
from vlfast.data.dataset import Dataset
from vlfast.data.dictionary import DICTIONARY_TEMPLATE, read_dictionary
from vlfast.data.folder import open_image
from vlfast.data.templates import prograd_template
from vlfast.data.views import image_batch
from vlfast.errors import VlfastError
from vlfast.evaluation.protocols import evaluate_dataset
from vlfast.objectives import Candidates, Objective, Task, build_objectives
from vlfast.objectives.general_knowledge import GeneralKnowledge
from vlfast.ops.backends import reference_only
from vlfast.parts import (
    CLASS_FEATURES,
    TEACHERS,
    check_config,
    class_table,
    load_classifier,
    load_parts,
    load_teacher,
    prompts_of,
    recorded_dataset,
    replace_template,
)
from vlfast.prompts import KINDS, EnsemblePrompt, HardPrompt, Prompts, tower_blocks
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.prompts.context import init_of_template
from vlfast.prompts.ensemble import OWN
from vlfast.trainers.averaging import check_averaging
from vlfast.trainers.batches import open_stores
from vlfast.trainers.config import Config, expand_shorthand, nest_options
from vlfast.trainers.context_history import FILE as CONTEXTS
from vlfast.trainers.device import make_accelerator, resolve_device
from vlfast.trainers.distributed import check_batch
from vlfast.trainers.feature_store import FeatureStore, about_data
from vlfast.trainers.fit import Fitted, OnStep, fit_prompts
from vlfast.trainers.gradient_projection import check_projection
from vlfast.trainers.images import TEST_BATCH, view_config
from vlfast.trainers.recipes import resolve_config
from vlfast.trainers.run_folder import CHECKPOINTS, RunFolder
from vlfast.trainers.tensorboard import check_tensorboard
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
    def dataset(self) -> Dataset:
        """What it was trained on, with all its classes; loaded when first asked for."""
        if self._dataset is None:
            self._dataset = recorded_dataset(self.config)
        return self._dataset

    @property
    def result(self) -> dict[str, Any]:
        return self.folder.read_result()

    def evaluate(
        self, data: Dataset | str | None = None, *, root: str | None = None
    ) -> dict[str, Any]:
        """Test it: on its own dataset, or on ``data`` (a Dataset, or a name with its ``root``).

        On its own dataset a run trained on base classes is tested base-to-new; on another, with all
        classes (cross-dataset). Percentages; see
        ``vlfast.evaluation.protocols.evaluate_dataset`` for the form.
        """
        classifier, config = self.classifier, self.config.data
        if data is None:
            dataset = self.dataset
        else:
            dataset = data if isinstance(data, Dataset) else load_dataset(data, root or config.root)
            if dataset.name != config.name and config.template is None:
                classifier = replace_template(classifier, dataset.template)
        classes = config.classes if dataset.name == config.name else "all"
        return evaluate_dataset(classifier, dataset, classes, config.workers)

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
        tensors = [f"{name}.safetensors" for name in (*CHECKPOINTS, CLASS_FEATURES, CONTEXTS)]
        for name in [*tensors, "metrics.jsonl", "result.json"]:
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
    check_config(config)
    config.output = str(config.output or default_output(config))
    check_averaging(config.recipe)
    check_projection(config.recipe)
    folder = RunFolder(config.output)
    if not resume:
        folder.check_free()
    if config.tensorboard:
        check_tensorboard()
    names = None
    if config.data.dictionary is not None:
        names = read_dictionary(config.data.dictionary)
        config.data.dictionary = str(Path(config.data.dictionary).absolute())
    device = resolve_device(config.model.device)
    if clip is not None:
        if config.model.device != "auto" and clip.device.type != device.type:
            raise VlfastError(
                f"model.device: {config.model.device} asked for, but the given model is on "
                f"{clip.device}"
            )
        device = clip.device
    accelerator = make_accelerator(device, config.model.precision)
    accelerator.wait_for_everyone()  # until all have looked whether the folder is free
    clip, dataset = load_parts(config, accelerator.device, clip, dataset)
    if config.data.template is not None:
        dataset = replace(dataset, template=config.data.template)
        if not _reads_template(config):
            warnings.warn(
                f"data.template: {config.prompts.kind} prompts have words of their own instead of "
                f"a template, so {config.data.template!r} changes nothing",
                stacklevel=2,
            )
    if config.prompts.init == "auto":
        config.prompts.init = dataset.context_init
    elif config.prompts.init == "template":
        config.prompts.init = init_of_template(prograd_template(dataset.name, dataset.template))

    drawn = dataset
    if config.data.shots and config.recipe.epochs:
        drawn = drawn.few_shot(config.data.shots, config.seed)
    fingerprint = drawn.fingerprint()
    if not config.data.unlabelled:
        drawn = drawn.restrict(config.data.classes)

    teacher = load_teacher(config, clip, drawn.classnames, dataset.template)
    table = class_table(config, dataset, teacher)
    torch.manual_seed(config.seed)
    prompts = prompts_of(config, clip, drawn.num_classes, table)
    classifier = PromptedClassifier(clip, prompts, drawn.classnames, dataset.template)
    config.prompts.n_ctx = prompts.num_context
    classifier.tokens.check_fits(config.prompts.n_ctx or 0, clip.text_tower.context_length)
    objectives = build_objectives(config.objectives)
    general = None if config.recipe.projection is None else GeneralKnowledge()
    task = Task(classifier, dataset.name, teacher=teacher, labelled=not config.data.unlabelled)
    if names is not None:
        task = _learn_from_dictionary(task, names, config)
    _check_task(task, objectives)
    stores: dict[str, FeatureStore] = {}
    if config.recipe.epochs and len(drawn.train):
        check_batch(config.recipe.batch_size, len(drawn.train), accelerator.num_processes)
        _check_batch(prompts, min(config.recipe.batch_size, len(drawn.train)))
        stores = open_stores(config, clip, teacher, about_data(config, dataset, fingerprint, clip))
        if config.data.augment and config.data.views is None and stores:
            config.data.views = min(store.views for store in stores.values())

    if not resume and accelerator.is_main_process:
        folder.start(config)
    accelerator.wait_for_everyone()
    with reference_only() if config.reference else nullcontext():
        if table is not None:
            features = table.fill(dataset.template)
            if accelerator.is_main_process:
                about = {"classnames": table.names, "template": table.template}
                folder.write_tensors(CLASS_FEATURES, {"features": features}, about)
        for part in (*objectives, general, task.candidates):
            if part is not None:
                part.prepare(task)
        fitted = fit_prompts(
            task,
            objectives,
            drawn,
            config,
            folder,
            accelerator,
            classifier=classifier,
            general=general,
            stores=stores,
            resume=resume,
            show_progress=show_progress,
            on_step=on_step,
        )
        run = Run(config, classifier, folder, dataset)
        accuracy, best = _test_checkpoints(run, dataset, fitted, accelerator)
    if accelerator.is_main_process:
        folder.write_result(
            {
                "recipe": config.recipe.name,
                "accuracy": accuracy,
                "epochs": fitted.epochs,
                "best_epoch": fitted.best_epoch,
                "best": best,
                "train_seconds": round(fitted.seconds, 3),
                "data": {
                    "name": dataset.name,
                    "fingerprint": fingerprint,
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


def resume(
    path: str | Path,
    *,
    clip: ClipModel | None = None,
    dataset: Dataset | None = None,
    show_progress: bool = True,
) -> Run:
    """Go on with a run after its last finished epoch; a finished run is only loaded.

    clip, dataset: those of a run that was trained on your own.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    config.output = str(path)
    if folder.finished:
        return load(path, clip=clip)
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
    """runs/DATA/MODEL/RECIPE-CLASSES-SHOTSshots-seedN; prompts and objectives that are not the
    recipe's own stand beside its name."""
    own = resolve_config({"recipe": config.recipe.name, "data": asdict(config.data)})
    parts = [config.recipe.name]
    if config.prompts.kind != own.prompts.kind:
        parts.append(config.prompts.kind)
    kinds = [objective["kind"] for objective in config.objectives]
    if kinds != [objective["kind"] for objective in own.objectives]:
        parts.append("+".join(kinds))
    shots = f"{config.data.shots}shots" if config.data.shots else "allshots"
    parts += [config.data.classes, shots, f"seed{config.seed}"]
    model = Path(config.model.name).stem
    return Path("runs") / config.data.name.replace("/", "-") / model / "-".join(parts)


def _learn_from_dictionary(task: Task, names: tuple[str, ...], config: Config) -> Task:
    """The same task with the dictionary's names in place of the dataset's."""
    clip, prompts = task.clip, task.prompts
    if prompts.class_bound:
        raise VlfastError(
            f"data.dictionary: {prompts.kind} prompts know only the classes they are made for; "
            "learn prompts that all classes share"
        )
    candidates = Candidates(config.data.top_classes)
    if task.teacher is None:
        raise VlfastError(
            "teacher: class-agnostic distillation needs one, which chooses from data.dictionary: "
            "--teacher NAME, a model, or --teacher.run DIR, a run"
        )
    classifier = PromptedClassifier(clip, prompts, names, DICTIONARY_TEMPLATE)
    classifier.tokens.check_fits(config.prompts.n_ctx or 0, clip.text_tower.context_length)
    return Task(
        classifier,
        "",
        teacher=task.teacher,
        labelled=False,
        candidates=candidates if config.data.top_classes < len(names) else None,
    )


def _test_checkpoints(
    run: Run, dataset: Dataset, fitted: Fitted, accelerator: Accelerator
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Scores of ``last``, which the run holds, and {"epoch", "accuracy"} of ``best`` where
    validation images chose one. All processes take part."""
    data = run.config.data
    how = {"workers": data.workers, "accelerator": accelerator, "encoded": {}}
    accuracy = evaluate_dataset(run.classifier, dataset, data.classes, **how)
    if fitted.best_epoch is None:
        return accuracy, None
    best = accuracy
    if fitted.best_epoch != fitted.epochs:
        chosen = load(run.folder.path, checkpoint="best", clip=run.classifier.clip)
        best = evaluate_dataset(chosen.classifier, dataset, data.classes, **how)
    return accuracy, {"epoch": fitted.best_epoch, "accuracy": best}


def _reads_template(config: Config) -> bool:
    """Whether anything that trains or answers depends on the dataset's template."""
    prompts, teacher = config.prompts, config.teacher
    own = OWN in (prompts.templates or [OWN])
    return (
        issubclass(KINDS.get(prompts.kind, Prompts), HardPrompt)
        or (prompts.kind == EnsemblePrompt.kind and own)
        or prompts.init == "template"
        or config.recipe.projection is not None
        or (teacher.name is not None and teacher.template is None)
        or any(o["kind"] in ("guidance", "mixture", "self_regulation") for o in config.objectives)
    )


def _check_task(task: Task, objectives: Sequence[Objective]) -> None:
    for objective in objectives:
        if objective.needs_teacher and task.teacher is None:
            raise VlfastError(f"teacher: the {objective.kind} objective needs one: {TEACHERS}")
        if objective.needs_labels and not task.labelled:
            why = "data.unlabelled: "
            if task.from_dictionary:
                why = "data.dictionary: the images' labels are not of its names, and "
            raise VlfastError(
                f"{why}the {objective.kind} objective needs labels; {objective.without_labels}"
            )
        objective.check(task)


def _check_batch(prompts: Prompts, batch: int) -> None:
    if batch < prompts.least_batch > 1:
        raise VlfastError(
            f"recipe.batch_size: the projector's batch norm needs at least {prompts.least_batch} "
            f"images a step, got {batch}"
        )


@torch.no_grad()
def _features(classifier: PromptedClassifier, pixels: Tensor) -> Tensor:
    return classifier.encode_images(pixels)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    return {
        "vlfast": __version__,
        "torch": version("torch"),
        "open_clip_torch": version("open_clip_torch"),
        "python": platform.python_version(),
    }
