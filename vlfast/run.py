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

from vlfast.clip.models import ClipModel, load_clip
from vlfast.data.catalog import load_dataset
from vlfast.data.dataset import Dataset
from vlfast.data.folder import open_image
from vlfast.data.views import image_batch
from vlfast.errors import UnknownNameError, VlfastError
from vlfast.evaluation.protocols import evaluate_dataset
from vlfast.objectives import Objective, Task, build_objectives
from vlfast.ops.backends import reference_only
from vlfast.prompts import HardPrompt, Prompts, build_prompts
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.config import Config, expand_shorthand, nest_options
from vlfast.trainers.context_history import FILE as CONTEXTS
from vlfast.trainers.device import make_accelerator, resolve_device
from vlfast.trainers.distributed import check_batch
from vlfast.trainers.fit import Fitted, OnStep, fit_prompts
from vlfast.trainers.images import TEST_BATCH, view_config
from vlfast.trainers.recipes import resolve_config
from vlfast.trainers.run_folder import CHECKPOINTS, RunFolder, load_learned
from vlfast.trainers.teacher import ModelTeacher
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
            self._dataset = _load_recorded_dataset(self.config)
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
        tensors = [f"{name}.safetensors" for name in (*CHECKPOINTS, CONTEXTS)]
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
    on_step: OnStep | None = None,
) -> Run:
    """Train and test what a full Config says; ``fit`` and the command line end here.

    on_step: called after each training step, see ``fit_prompts``.
    """
    config = copy.deepcopy(config)
    config.output = str(config.output or default_output(config))
    folder = RunFolder(config.output)
    if not resume:
        folder.check_free()
    if config.tensorboard:
        check_tensorboard()
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
    if clip is None:
        clip = _load_recorded_clip(config, accelerator.device)
    elif config.model.max_memory is not None:
        clip.text_tower.max_memory = config.model.max_memory
    if dataset is None:
        dataset = _load_recorded_dataset(config)
    # What the run's folder records must be found again from another working directory.
    config.model.name, config.model.pretrained = clip.name, clip.pretrained
    if config.data.root is not None:
        config.data.root = str(Path(config.data.root).absolute())
    if config.data.template is not None:
        dataset = replace(dataset, template=config.data.template)
        if config.prompts.kind != HardPrompt.kind:
            warnings.warn(
                f"data.template: {config.prompts.kind} prompts have a learned context instead of "
                f"a template, so {config.data.template!r} changes nothing",
                stacklevel=2,
            )
    if config.prompts.init == "auto":
        config.prompts.init = dataset.context_init

    drawn = dataset
    if config.data.shots and config.recipe.epochs:
        drawn = drawn.few_shot(config.data.shots, config.seed)
    fingerprint = drawn.fingerprint()
    if not config.data.unlabelled:
        drawn = drawn.restrict(config.data.classes)

    torch.manual_seed(config.seed)
    prompts = _build_prompts(config, clip, drawn.num_classes)
    classifier = PromptedClassifier(clip, prompts, drawn.classnames, dataset.template)
    vectors = prompts.context_vectors()
    config.prompts.n_ctx = None if vectors is None else vectors.shape[-2]
    classifier.tokens.check_fits(config.prompts.n_ctx or 0, clip.text_tower.context_length)
    objectives = build_objectives(config.objectives)
    task = Task(
        classifier,
        dataset.name,
        teacher=_load_teacher(config, clip, drawn.classnames, dataset.template),
        labelled=not config.data.unlabelled,
    )
    _check_task(task, objectives)
    if config.recipe.epochs:
        check_batch(config.recipe.batch_size, len(drawn.train), accelerator.num_processes)

    if not resume and accelerator.is_main_process:
        folder.start(config)
    accelerator.wait_for_everyone()
    with reference_only() if config.reference else nullcontext():
        for objective in objectives:
            objective.prepare(task)
        fitted = fit_prompts(
            task,
            objectives,
            drawn,
            config,
            folder,
            accelerator,
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
    folder = RunFolder(path)
    config = folder.read_config()
    tensors, about = folder.read_tensors(checkpoint)
    if clip is None:
        clip = _load_recorded_clip(config, resolve_device(device))
    elif (clip.name, clip.pretrained) != (config.model.name, config.model.pretrained):
        raise VlfastError(
            f"clip: this run was trained on {config.model.name} ({config.model.pretrained}), "
            f"got {clip.name} ({clip.pretrained})"
        )
    prompts = _build_prompts(config, clip, len(about["classnames"]))
    own = {name: t for name, t in tensors.items() if not name.startswith("objectives.")}
    load_learned(prompts.state_dict(), own, folder.path / f"{checkpoint}.safetensors")
    classifier = PromptedClassifier(clip, prompts, about["classnames"], about["template"])
    return Run(config, classifier, folder)


def replace_template(classifier: PromptedClassifier, template: str) -> PromptedClassifier:
    """The same prompts and class names with another dataset's template."""
    return PromptedClassifier(classifier.clip, classifier.prompts, classifier.classnames, template)


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


def _load_recorded_clip(config: Config, device: torch.device) -> ClipModel:
    try:
        clip = load_clip(config.model.name, config.model.pretrained, device=device)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}; if the model was built in Python, pass clip=") from error
    clip.text_tower.max_memory = config.model.max_memory
    return clip


def _load_recorded_dataset(config: Config) -> Dataset:
    try:
        return load_dataset(config.data.name, config.data.root)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{error}; if the dataset was built in Python, pass it: evaluate(data), "
            "resume(path, dataset=data)"
        ) from error


def _load_teacher(
    config: Config, student: ClipModel, classnames: Sequence[str], template: str
) -> ModelTeacher | None:
    options = config.teacher
    if options.name is None:
        return None
    clip = load_clip(options.name, options.pretrained, device=student.device)
    classifier = PromptedClassifier(clip, HardPrompt(), classnames, options.template or template)
    return ModelTeacher(classifier, student, calibration=options.calibration)


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


def _check_task(task: Task, objectives: Sequence[Objective]) -> None:
    for objective in objectives:
        if objective.needs_teacher and task.teacher is None:
            raise VlfastError(
                f"teacher: the {objective.kind} objective needs one: --teacher NAME, a model, or "
                "--teacher.run DIR, a run"
            )
        if objective.needs_labels and not task.labelled:
            raise VlfastError(
                f"data.unlabelled: the {objective.kind} objective needs labels; learn from a "
                "teacher instead (--objective teacher)"
            )
        objective.check(task)


@torch.no_grad()
def _features(classifier: PromptedClassifier, pixels: Tensor) -> Tensor:
    return classifier.encode_images(pixels)


def _build_prompts(config: Config, clip: ClipModel, num_classes: int) -> Prompts:
    options = asdict(config.prompts)
    for of_student in ("projector", "class_features"):
        options.pop(of_student)
    return build_prompts(options.pop("kind"), clip, num_classes=num_classes, **options).to(
        clip.device
    )


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
