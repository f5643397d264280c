"""One config for a run: the same as dataclasses, YAML and command-line options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from vlfast.clip.text_tower import Position
from vlfast.data.dataset import ClassSubset
from vlfast.errors import VlfastError, unknown_name

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Precision = Literal["fp32", "bf16", "fp16"]
Setting = Literal["auto", "few-shot", "base-to-new", "cross-dataset"]


@dataclass
class ModelConfig:
    """The frozen CLIP.

    Attributes:
        name: A bundled model (glyphs-student, glyphs-teacher), an open_clip name, or a file.
        pretrained: An open_clip tag or the path of a weight file; bundled models need none.
        precision: What the forward pass computes in; prompts stay fp32.
        device: "auto" takes a GPU if there is one; else "cpu", "cuda", "cuda:1", ...
        max_memory: What encoding the class names may take at a time, such as 2GB: more classes are
            then encoded in chunks, each once more in its backward. By default there is no limit.
    """

    name: str = "glyphs-student"
    pretrained: str | None = None
    precision: Precision = "fp32"
    device: str = "auto"
    max_memory: str | None = None


@dataclass
class DataConfig:
    """The images.

    Attributes:
        name: glyphs/THEME, or "folder" for your own images in root/{train,val,test}/CLASS/.
        root: The folder of the images, where the dataset has one.
        classnames: A file of class names, one a line, for images that come without any.
        shots: Training images a class; 0 takes all.
        classes: All classes, the base half or the new half.
        template: The text of hard prompts, with one {}; the dataset's own by default.
        augment: Random views of the training images; False trains on the test views.
        views: Random views an image; epoch e takes number 1 + (e - 1) % views. By default every
            epoch draws new ones.
        features: A folder that `vlfast features` wrote: train from the stored features of the
            frozen models instead of computing them in every step.
        test_features: A folder that keeps what the frozen image tower makes of test images, for
            other runs with the same model and images; filled as needed.
        unlabelled: Train on the images of all classes, whatever `classes` says, without labels.
        dictionary: A file of class names, one a line, to learn from instead of the dataset's
            (class-agnostic KDPL): in each step those that the teacher finds most probable.
        top_classes: How many of the dictionary's names a step learns from.
        workers: Processes that load images; by default as many as help.
    """

    name: str = "glyphs/tools"
    root: str | None = None
    classnames: str | None = None
    shots: int = 16
    classes: ClassSubset = "all"
    template: str | None = None
    augment: bool = True
    views: int | None = None
    features: str | None = None
    test_features: str | None = None
    unlabelled: bool = False
    dictionary: str | None = None
    top_classes: int = 1000
    workers: int | None = None


@dataclass
class PromptsConfig:
    """Where learnable tokens live.

    Attributes:
        kind: hard, ensemble, shared, class_specific, conditional, visual, independent, coupled or
            finetune.
        n_ctx: Context tokens in the text tower; by default as many as init has.
        init: Words to start from; "auto" takes the dataset's; "template" those of the template that
            ProGrad has for it, behind zeros; nothing draws at random.
        position: Where the class name stands in the context.
        depth: Blocks of the text tower that get context of their own, the input being the first.
        n_visual: Tokens in the image tower.
        visual_depth: Blocks of the image tower that get tokens of their own.
        templates: The hard prompts of an ensemble, each with one {}; "own" stands for the
            dataset's.
        projector: Layers of a learned projector from the image features to the teacher's; by
            default there is none.
        class_features: Whose class features images are compared with: the model's own, which
            depend on the prompts, or the teacher's, computed once.
    """

    kind: str = "shared"
    n_ctx: int | None = 16
    init: str | None = None
    position: Position = "end"
    depth: int = 1
    n_visual: int | None = None
    visual_depth: int | None = None
    templates: list[str] | None = None
    projector: int | None = None
    class_features: Literal["own", "teacher"] = "own"


@dataclass
class TeacherConfig:
    """A frozen model to learn from; what is given of name, run and features says which.

    Attributes:
        name: A CLIP, named as model.name is.
        pretrained: Its weights, as model.pretrained.
        run: The folder of a run with another model; its learned prompts serve.
        features: A folder of stored features and class features, instead of a model.
        template: The text of its class features, with one {}; the dataset's own by default.
        calibration: A temperature that its logits are divided by.
    """

    name: str | None = None
    pretrained: str | None = None
    run: str | None = None
    features: str | None = None
    template: str | None = None
    calibration: float = 1.0


@dataclass
class RecipeConfig:
    """How it is trained.

    Attributes:
        name: The named recipe that the rest was filled from.
        epochs: Passes over the training images.
        batch_size: Images a step.
        lr: The learning rate after warm-up.
        momentum: Of SGD.
        weight_decay: Of SGD, on every learnable tensor.
        warmup_epochs: Epochs at warmup_lr before the cosine begins.
        warmup_lr: The constant learning rate of the warm-up.
        clip_grad_norm: The largest gradient norm; by default gradients are not clipped.
        projection: ProGrad's factor: how much of the gradient that goes against zero-shot CLIP's
            knowledge is taken away; by default none.
        average_mean: PromptSRC's Gaussian averaging of the prompts over epochs: the epoch that
            weighs most; by default the last epoch's prompts are kept as they are.
        average_std: Its width in epochs.
        setting: What the recipe's hyperparameters are for; "auto" takes base-to-new for a half of
            the classes, cross-dataset for all of ImageNet, else few-shot.
    """

    name: str = "coop"
    epochs: int = 50
    batch_size: int = 32
    lr: float = 0.002
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    clip_grad_norm: float | None = None
    projection: float | None = None
    average_mean: float | None = None
    average_std: float | None = None
    setting: Setting = "auto"


@dataclass
class Config:
    """A whole run.

    Attributes:
        model: The frozen CLIP.
        data: The images.
        prompts: Where learnable tokens live.
        objectives: What they learn from: entries {kind, weight, ...}.
        recipe: How it is trained.
        teacher: A frozen model to learn from.
        seed: Of the few-shot draw, the initialisation, the order and the views.
        output: The run's folder; by default runs/DATA/MODEL/RECIPE-....
        reference: Use the plain PyTorch twin of every fused op.
        tensorboard: Write the metrics for TensorBoard too.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    objectives: list[dict[str, Any]] = field(default_factory=lambda: [{"kind": "labels"}])
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    seed: int = 1
    output: str | None = None
    reference: bool = False
    tensorboard: bool = False


# The option of each section that a bare word stands for: `--recipe coop` is `--recipe.name coop`.
SHORTHAND = {
    "model": "name",
    "data": "name",
    "prompts": "kind",
    "recipe": "name",
    "teacher": "name",
}

_TOP = frozenset(f.name for f in fields(Config))


def config_parser(prog: str = "vlfast", description: str | None = None) -> ArgumentParser:
    """The jsonargparse parser of a Config: one option a field, nested with dots. Its errors are
    raised, not printed."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=prog,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_class_arguments(Config, None)
    return parser


@cache
def _object_parser() -> ArgumentParser:
    """For nested values: making one takes longer than using it."""
    return config_parser()


def build_config(values: Mapping[str, Any]) -> Config:
    """A Config from nested values, every type checked; what is not given takes its default.

    A bare word stands for a section's name ({"recipe": "coop"}). Raises UnknownNameError for an
    unknown option (with the nearest), VlfastError for a value of the wrong type.
    """
    from jsonargparse import ArgumentError

    values = expand_shorthand(values)
    check_options(values)
    parser = _object_parser()
    try:
        built = parser.instantiate(parser.parse_object(values))
    except ArgumentError as error:
        raise VlfastError(one_line(error)) from error
    return Config(**{f.name: built[f.name] for f in fields(Config)})


def expand_shorthand(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"recipe": "coop"} as {"recipe": {"name": "coop"}}; section dataclasses as dicts."""
    expanded = {}
    for key, value in values.items():
        if key in SHORTHAND and isinstance(value, str):
            value = {SHORTHAND[key]: value}
        elif is_dataclass(value):
            value = asdict(value)
        expanded[key] = value
    return expanded


def nest_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """{"epochs": 10} as {"recipe": {"epochs": 10}}: options that only one section has may be flat.

    Sections and what is known to none are left as they are; a teacher's options are never flat,
    since they are a model's. Raises VlfastError for a flat option that several sections have.
    """
    homes: dict[str, list[str]] = {}
    for section in fields(Config):
        if is_dataclass(section.default_factory) and section.name != "teacher":
            for option in fields(section.default_factory):
                homes.setdefault(option.name, []).append(section.name)
    nested: dict[str, Any] = {}
    for key, value in expand_shorthand(options).items():
        sections = [] if key in _TOP else homes.get(key, [])
        if len(sections) > 1:
            raise VlfastError(
                f"{key}: expected it inside its section, since {' and '.join(sections)} have it"
            )
        if sections:
            nested.setdefault(sections[0], {})[key] = value
        elif isinstance(value, Mapping) and isinstance(nested.get(key), Mapping):
            nested[key] = {**value, **nested[key]}
        else:
            nested[key] = value
    return nested


def merge_options(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options, ``above`` winning; lists are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_options(merged[key], value) if both else value
    return merged


def check_options(values: Mapping[str, Any], section: type = Config, prefix: str = "") -> None:
    """Raise UnknownNameError for an option that no section has."""
    known = {f.name: f for f in fields(section)}
    for key, value in values.items():
        if key not in known:
            raise unknown_name("option", prefix + key, [prefix + name for name in known])
        nested = known[key].default_factory
        if is_dataclass(nested):
            if not isinstance(value, Mapping):
                raise VlfastError(
                    f"{prefix}{key}: expected options of {nested.__name__}, got {value!r}"
                )
            check_options(value, nested, f"{prefix}{key}.")


def one_line(error: Exception) -> str:
    """A message of jsonargparse on one line."""
    text = " ".join(str(error).split()).replace("<class '", "").replace("'>", "")
    return text.replace("Parser key ", "option ").replace("typing.", "")
