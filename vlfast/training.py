"""From a full config to a trained and tested run: all is decided and checked, then carried out."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vlfast.clip.models import ClipModel
from vlfast.data.dataset import Dataset, no_training_images
from vlfast.data.dictionary import DICTIONARY_TEMPLATE, read_dictionary
from vlfast.data.templates import prograd_template
from vlfast.errors import VlfastError
from vlfast.evaluation.evaluate import evaluate_dataset
from vlfast.evaluation.kept_features import KeptFeatures
from vlfast.evaluation.predictions import ByTest, to_tensors
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
)
from vlfast.prompts import KINDS, EnsemblePrompt, HardPrompt, Prompts
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.prompts.context import init_of_template
from vlfast.prompts.ensemble import OWN
from vlfast.prompts.projected import ClassTable
from vlfast.trainers.averaging import check_averaging
from vlfast.trainers.batches import open_stores
from vlfast.trainers.config import Config
from vlfast.trainers.device import make_accelerator, resolve_device
from vlfast.trainers.distributed import check_batch
from vlfast.trainers.feature_store import FeatureStore, about_data
from vlfast.trainers.fit import Fitted, OnStep, fit_prompts
from vlfast.trainers.gradient_projection import check_projection
from vlfast.trainers.recipes import check_combination
from vlfast.trainers.run_folder import PREDICTIONS, RunFolder
from vlfast.trainers.tensorboard import check_tensorboard
from vlfast.version import __version__


@dataclass(frozen=True)
class Plan:
    """A run before its first step.

    config: resolved further, to what the model and the dataset say. dataset: whole. drawn: what is
    trained on, with the fingerprint of its images. classifier: the prompts over the dataset's class
    names; the task's has those that are learned from. table: the teacher's class features, where
    images are compared with them. general: what recipe.projection holds gradients against.
    """

    config: Config
    folder: RunFolder
    accelerator: Accelerator
    dataset: Dataset
    drawn: Dataset
    fingerprint: str
    classifier: PromptedClassifier
    table: ClassTable | None
    task: Task
    objectives: list[Objective]
    general: GeneralKnowledge | None
    stores: dict[str, FeatureStore]

    def carry_out(self, *, resume: bool, show_progress: bool, on_step: OnStep | None) -> None:
        """Train, test, and write the result to the run's folder."""
        main = self.accelerator.is_main_process
        if not resume and main:
            self.folder.start(self.config)
        self.accelerator.wait_for_everyone()
        with reference_only() if self.config.reference else nullcontext():
            self._encode_what_is_frozen()
            fitted = fit_prompts(
                self.task,
                self.objectives,
                self.drawn,
                self.config,
                self.folder,
                self.accelerator,
                classifier=self.classifier,
                general=self.general,
                stores=self.stores,
                resume=resume,
                show_progress=show_progress,
                on_step=on_step,
            )
            accuracy, best = self._test(fitted)
        if main:
            self.folder.write_result(self._result(fitted, accuracy, best))
        self.accelerator.wait_for_everyone()

    def _encode_what_is_frozen(self) -> None:
        if self.table is not None:
            features = self.table.fill(self.dataset.template)
            if self.accelerator.is_main_process:
                about = {"classnames": self.table.names, "template": self.table.template}
                self.folder.write_tensors(CLASS_FEATURES, {"features": features}, about)
        for part in (*self.objectives, self.general, self.task.candidates):
            if part is not None:
                part.prepare(self.task)

    def _test(self, fitted: Fitted) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Scores of ``last``, which the prompts hold, and {"epoch", "accuracy"} of ``best`` where
        validation images chose one. All processes take part."""
        data = self.config.data
        how = {"workers": data.workers, "accelerator": self.accelerator}
        how["kept"] = KeptFeatures(data.test_features)
        predictions: ByTest = {}
        accuracy = evaluate_dataset(
            self.classifier, self.dataset, data.classes, predictions=predictions, **how
        )
        if self.accelerator.is_main_process:
            self.folder.write_tensors(PREDICTIONS, *to_tensors(predictions))
        if fitted.best_epoch is None:
            return accuracy, None
        best = accuracy
        if fitted.best_epoch != fitted.epochs:
            clip = self.classifier.clip
            _, chosen = load_classifier(self.folder.path, "best", str(clip.device), clip)
            best = evaluate_dataset(chosen, self.dataset, data.classes, **how)
        return accuracy, {"epoch": fitted.best_epoch, "accuracy": best}

    def _result(
        self, fitted: Fitted, accuracy: dict[str, Any], best: dict[str, Any] | None
    ) -> dict[str, Any]:
        splits = self.drawn.splits()
        return {
            "recipe": self.config.recipe.name,
            "accuracy": accuracy,
            "epochs": fitted.epochs,
            "best_epoch": fitted.best_epoch,
            "best": best,
            "train_seconds": round(fitted.seconds, 3),
            "data": {
                "name": self.dataset.name,
                "fingerprint": self.fingerprint,
                "classes": self.drawn.num_classes,
                "images": {name: len(split) for name, split in splits.items()},
                "few_shot": self.drawn.few_shot_from,
            },
            "seed": self.config.seed,
            "device": device_name(self.accelerator.device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }


def plan_training(
    config: Config,
    *,
    resume: bool = False,
    clip: ClipModel | None = None,
    dataset: Dataset | None = None,
) -> Plan:
    """Load what the config names and check that all of it fits together; nothing is written. What
    the config leaves to the model and the dataset is filled in, in place.

    Raises VlfastError, or one of its kind, naming the option.
    """
    folder = RunFolder(config.output)
    if not resume:
        folder.check_free()
    check_config(config)
    check_averaging(config.recipe)
    check_projection(config.recipe)
    if config.tensorboard:
        check_tensorboard()
    names = _read_dictionary(config)
    accelerator = _accelerator(config, clip)
    clip, dataset = load_parts(config, accelerator.device, clip, dataset)
    dataset = _with_words(config, dataset)
    if not dataset.labelled:
        config.data.unlabelled = True
        check_combination(config)
    drawn, fingerprint = _draw(config, dataset)

    teacher = load_teacher(config, clip, drawn.classnames, dataset.template)
    table = class_table(config, dataset, teacher)
    torch.manual_seed(config.seed)
    prompts = prompts_of(config, clip, drawn.num_classes, table)
    classifier = PromptedClassifier(clip, prompts, drawn.classnames, dataset.template)
    config.prompts.n_ctx = prompts.num_context
    classifier.tokens.check_fits(config.prompts.n_ctx or 0, clip.text_tower.context_length)

    objectives = build_objectives(config.objectives)
    # Where nothing is learned no label is missed: zero-shot CLIP is tested all the same.
    labelled = not config.data.unlabelled or not config.recipe.epochs
    task = Task(classifier, dataset.name, teacher=teacher, labelled=labelled)
    if names is not None:
        task = _learn_from_dictionary(task, names, config)
    _check_task(task, objectives, dataset)
    if teacher is not None and table is None and not _learns_from_teacher(task, objectives):
        warnings.warn(
            "teacher: nothing learns from it; --objective teacher replaces the labels, "
            "--add teacher joins them",
            stacklevel=3,
        )
    stores: dict[str, FeatureStore] = {}
    if config.recipe.epochs and len(drawn.train):
        check_batch(config.recipe.batch_size, len(drawn.train), accelerator.num_processes)
        _check_least_batch(prompts, min(config.recipe.batch_size, len(drawn.train)))
        stores = open_stores(config, clip, teacher, about_data(config, dataset, fingerprint, clip))
        if config.data.augment and config.data.views is None and stores:
            config.data.views = min(store.views for store in stores.values())
    general = None if config.recipe.projection is None else GeneralKnowledge()
    return Plan(
        config=config,
        folder=folder,
        accelerator=accelerator,
        dataset=dataset,
        drawn=drawn,
        fingerprint=fingerprint,
        classifier=classifier,
        table=table,
        task=task,
        objectives=objectives,
        general=general,
        stores=stores,
    )


def _read_dictionary(config: Config) -> tuple[str, ...] | None:
    if config.data.dictionary is None:
        return None
    names = read_dictionary(config.data.dictionary)
    config.data.dictionary = str(Path(config.data.dictionary).expanduser().absolute())
    return names


def _accelerator(config: Config, clip: ClipModel | None) -> Accelerator:
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
    return accelerator


def _with_words(config: Config, dataset: Dataset) -> Dataset:
    """The dataset with the template that was asked for; "auto" and "template" contexts as words."""
    if config.data.template is not None:
        dataset = replace(dataset, template=config.data.template)
        if not _reads_template(config):
            warnings.warn(
                f"data.template: {config.prompts.kind} prompts have words of their own instead of "
                f"a template, so {config.data.template!r} changes nothing of theirs",
                stacklevel=4,
            )
    if config.prompts.init == "auto":
        config.prompts.init = dataset.context_init
    elif config.prompts.init == "template":
        config.prompts.init = init_of_template(prograd_template(dataset.name, dataset.template))
    return dataset


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


def _draw(config: Config, dataset: Dataset) -> tuple[Dataset, str]:
    """What is trained on, and the fingerprint of the images drawn, of all classes."""
    drawn = dataset
    if config.recipe.epochs and not len(dataset.train):
        raise VlfastError(no_training_images(dataset))
    if config.data.shots and config.recipe.epochs:
        drawn = drawn.few_shot(config.data.shots, config.seed)
    fingerprint = drawn.fingerprint()
    return (drawn if config.data.unlabelled else drawn.restrict(config.data.classes)), fingerprint


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


def _check_task(task: Task, objectives: Sequence[Objective], dataset: Dataset) -> None:
    for objective in objectives:
        if objective.needs_teacher and task.teacher is None:
            raise VlfastError(f"teacher: the {objective.kind} objective needs one: {TEACHERS}")
        if objective.needs_labels and not task.labelled:
            why = "data.unlabelled: "
            if not dataset.labelled:
                why = f"data: the training images of {dataset.name} have no labels, and "
            elif task.from_dictionary:
                why = "data.dictionary: the images' labels are not of its names, and "
            raise VlfastError(
                f"{why}the {objective.kind} objective needs labels; {objective.without_labels}"
            )
        objective.check(task)


def _learns_from_teacher(task: Task, objectives: Sequence[Objective]) -> bool:
    return task.candidates is not None or any(o.needs_teacher for o in objectives)


def _check_least_batch(prompts: Prompts, batch: int) -> None:
    if batch < prompts.least_batch > 1:
        raise VlfastError(
            f"recipe.batch_size: the projector's batch norm needs at least {prompts.least_batch} "
            f"images a step, got {batch}"
        )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    return {
        "vlfast": __version__,
        "torch": version("torch"),
        "open_clip_torch": version("open_clip_torch"),
        "python": platform.python_version(),
    }
