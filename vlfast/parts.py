"""From a config to the parts of a run: its model and dataset, its prompts, its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vlfast.clip.models import ClipModel, load_clip
from vlfast.data.catalog import load_dataset
from vlfast.data.dataset import Dataset
from vlfast.data.dictionary import read_names
from vlfast.data.templates import POOLS
from vlfast.errors import UnknownNameError, VlfastError
from vlfast.prompts import HardPrompt, Prompts, build_prompts
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.prompts.projected import ClassTable, ProjectedPrompts
from vlfast.trainers.batches import check_views
from vlfast.trainers.config import Config
from vlfast.trainers.device import resolve_device
from vlfast.trainers.feature_store import FeatureStore
from vlfast.trainers.run_folder import RunFolder, load_learned
from vlfast.trainers.teacher import ModelTeacher, StoredTeacher, check_teacher

TEACHERS = (
    "--teacher NAME, a model, --teacher.run DIR, a run, or --teacher.features DIR, stored features"
)
CLASS_FEATURES = "class_features"  # what a run's folder keeps of a teacher


def check_config(config: Config) -> None:
    """Raise VlfastError for options that contradict each other, before anything is loaded."""
    check_teacher(config.teacher)
    check_views(config.data)


def load_parts(
    config: Config, device: torch.device, clip: ClipModel | None, dataset: Dataset | None
) -> tuple[ClipModel, Dataset]:
    """The model and the dataset of a config, those that are given as they are. Files and folders in
    the config become absolute: it must be found again from another working directory."""
    if clip is None:
        clip = recorded_clip(config, device)
    elif config.model.max_memory is not None:
        clip.text_tower.max_memory = config.model.max_memory
    if dataset is None:
        dataset = recorded_dataset(config)
    if config.data.unlabelled and not len(dataset.train):
        # Transductive, as PromptKD learns on ImageNet's variants, which are tests alone.
        dataset = replace(dataset, train=dataset.test)
    config.model.name, config.model.pretrained = clip.name, clip.pretrained
    data, teacher = config.data, config.teacher
    data.root, data.features = _absolute(data.root), _absolute(data.features)
    data.classnames, data.test_features = map(_absolute, (data.classnames, data.test_features))
    teacher.run, teacher.features = _absolute(teacher.run), _absolute(teacher.features)
    for objective in config.objectives:
        for option in ("pool", "templates"):  # a file, unless it is a pool by its name
            if objective.get(option) not in (None, *POOLS):
                objective[option] = _absolute(objective[option])
    return clip, dataset


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def recorded_clip(config: Config, device: torch.device) -> ClipModel:
    try:
        clip = load_clip(config.model.name, config.model.pretrained, device=device)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}; if the model was built in Python, pass clip=") from error
    clip.text_tower.max_memory = config.model.max_memory
    return clip


def recorded_dataset(config: Config) -> Dataset:
    data = config.data
    classnames: str | Sequence[str] | None = data.classnames
    if data.name == "unlabelled" and classnames is None and data.dictionary is not None:
        # Without class names the images may show whatever the dictionary has.
        names = read_names(data.dictionary, "data.dictionary")
        classnames = tuple(dict.fromkeys(name for _, name in names))
    try:
        return load_dataset(data.name, data.root, classnames)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{error}; if the dataset was built in Python, pass it: evaluate(data), "
            "resume(path, dataset=data)"
        ) from error


def load_teacher(
    config: Config, student: ClipModel, classnames: Sequence[str], template: str
) -> ModelTeacher | StoredTeacher | None:
    """The teacher that the config names, on the student's device, or None. Files in the config
    become absolute.

    classnames, template: what its class features will be of. Raises FileNotFoundError or
    VlfastError, with the reason, for one that is missing or can't serve.
    """
    options = config.teacher
    if options.features is not None:
        teacher = StoredTeacher(
            FeatureStore(options.features, "teacher.features"),
            student.device,
            calibration=options.calibration,
        )
        teacher.class_features(classnames, options.template)
        return teacher
    if options.run is not None:
        classifier = _teaching_run(options.run, student.device, classnames, options.template)
    elif options.name is not None:
        clip = load_clip(options.name, options.pretrained, device=student.device)
        clip.text_tower.max_memory = config.model.max_memory
        options.name, options.pretrained = clip.name, clip.pretrained
        template = options.template or template
        classifier = PromptedClassifier(clip, HardPrompt(), classnames, template)
    else:
        return None
    return ModelTeacher(classifier, student, calibration=options.calibration)


def _teaching_run(
    path: str, device: torch.device, classnames: Sequence[str], template: str | None
) -> PromptedClassifier:
    if not Path(path, "config.yaml").is_file():
        raise FileNotFoundError(f"teacher.run: {path} is not a run's folder, it has no config.yaml")
    _, classifier = load_classifier(path, "last", str(device))
    if template is not None:
        if not isinstance(classifier.prompts, HardPrompt):
            raise VlfastError(
                f"teacher.template: {path} has learned {classifier.prompts.kind} prompts instead "
                f"of a template, got {template!r}"
            )
        classifier = replace_template(classifier, template)
    try:
        classifier.for_classes(classnames)
    except ValueError as error:
        raise VlfastError(f"teacher.run: {path} can't teach these classes; {error}") from error
    return classifier


def _follows_template(config: Config) -> bool:
    """Whether the teacher's class features depend on the dataset's template."""
    return config.teacher.name is not None and config.teacher.template is None


def class_table(
    config: Config, dataset: Dataset, teacher: ModelTeacher | StoredTeacher | None
) -> ClassTable | None:
    """The teacher's features of all the dataset's classes, where the prompts are to have them."""
    if config.prompts.class_features == "own":
        return None
    if teacher is None:
        raise VlfastError(
            f"prompts.class_features: the teacher's asked for, but there is no teacher: {TEACHERS}"
        )
    follows = _follows_template(config)
    return ClassTable(
        dataset.classnames,
        dataset.template if follows else None,
        width=teacher.width,
        ask=lambda names, template: teacher.class_features(names, template if follows else None),
    )


def _kept_class_table(config: Config, folder: RunFolder, clip: ClipModel) -> ClassTable | None:
    """What a run's folder keeps; its teacher is loaded only if it is asked for other classes."""
    if config.prompts.class_features == "own":
        return None
    tensors, about = folder.read_tensors(CLASS_FEATURES)
    features = tensors["features"].to(clip.device)
    return ClassTable(
        about["classnames"],
        about["template"],
        width=features.shape[1],
        features=features,
        ask=_ask_recorded_teacher(config, clip, about["classnames"]),
    )


def _ask_recorded_teacher(
    config: Config, clip: ClipModel, classnames: Sequence[str]
) -> Callable[[Sequence[str], str], Tensor]:
    follows = _follows_template(config)

    @cache
    def teacher(template: str) -> ModelTeacher | StoredTeacher:
        return load_teacher(config, clip, classnames, template)

    def ask(names: Sequence[str], template: str) -> Tensor:
        try:
            return teacher(template).class_features(names, template if follows else None)
        except (OSError, ValueError, VlfastError) as error:
            raise VlfastError(
                f"classnames: this run keeps the teacher's features of its own classes; for "
                f"{', '.join(map(repr, names[:3]))}{', ...' * (len(names) > 3)} it needs the "
                f"teacher: {error}"
            ) from error

    return ask


def prompts_of(
    config: Config, clip: ClipModel, num_classes: int, table: ClassTable | None
) -> Prompts:
    """In eval mode. table: the teacher's class features, where they are to have them."""
    options = asdict(config.prompts)
    layers = options.pop("projector")
    options.pop("class_features")
    prompts = build_prompts(options.pop("kind"), clip, num_classes=num_classes, **options)
    if layers is not None or table is not None:
        prompts = ProjectedPrompts(clip, prompts.to(clip.device), layers=layers, classes=table)
    return prompts.to(clip.device).eval()


def load_classifier(
    path: str | Path, checkpoint: str, device: str, clip: ClipModel | None = None
) -> tuple[Config, PromptedClassifier]:
    """What a run's folder holds; see ``vlfast.load``."""
    folder = RunFolder(path)
    config = folder.read_config()
    tensors, about = folder.read_tensors(checkpoint)
    if clip is None:
        clip = recorded_clip(config, resolve_device(device))
    elif (clip.name, clip.pretrained) != (config.model.name, config.model.pretrained):
        raise VlfastError(
            f"clip: this run was trained on {config.model.name} ({config.model.pretrained}), "
            f"got {clip.name} ({clip.pretrained})"
        )
    table = _kept_class_table(config, folder, clip)
    prompts = prompts_of(config, clip, len(about["classnames"]), table)
    own = {name: t for name, t in tensors.items() if not name.startswith("objectives.")}
    load_learned(prompts.state_dict(), own, folder.path / f"{checkpoint}.safetensors")
    return config, PromptedClassifier(clip, prompts, about["classnames"], about["template"])


def replace_template(classifier: PromptedClassifier, template: str) -> PromptedClassifier:
    """The same prompts and class names with another dataset's template."""
    return PromptedClassifier(classifier.clip, classifier.prompts, classifier.classnames, template)
