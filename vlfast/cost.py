"""What recipes cost, side by side: parameters, time and memory of a training step, speed and work
at test.

Each recipe runs in a process of its own, its fit loop as it is, on images that lie in memory.
"""

from __future__ import annotations

import csv
import ctypes
import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vlfast.ops.flops  # noqa: F401  (so that the counter knows our ops)
from vlfast.clip.models import load_clip
from vlfast.data.dataset import Dataset, Split
from vlfast.errors import VlfastError
from vlfast.evaluation.tables import text_table
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.run import train
from vlfast.trainers.config import Config, merge_options
from vlfast.trainers.device import resolve_device
from vlfast.trainers.fit import TrainingStep
from vlfast.trainers.recipes import RECIPES, resolve_config

WARM_UP = 2  # steps before the first that counts
TEST_BATCH = 32
SECONDS_OF_TEST = 0.5  # at least, of small models
DICTIONARY = 2000  # names that class-agnostic recipes choose from
UNTRAINED = "random"  # the tag of weights that nobody trained

# fmt: off
_ADJECTIVES = (
    "small", "large", "old", "new", "red", "green", "wild", "plain", "round", "striped", "broken",
    "bright", "quiet", "heavy", "hollow", "folded", "wooden", "rusty", "tiny", "grey",
)
_NOUNS = (
    "apple", "boat", "bridge", "camera", "chair", "church", "clock", "cup", "dog", "drum", "fish",
    "flower", "goat", "guitar", "hammer", "house", "kettle", "lamp", "leaf", "lion", "mouse",
    "owl", "piano", "rabbit", "robot", "shoe", "spoon", "tiger", "truck", "violin", "wolf",
)
# fmt: on


@dataclass(frozen=True)
class Cost:
    """What one recipe costs; None where a number does not apply or can't be had.

    learned: parameters with a gradient, those of objectives too. step_seconds: a whole training
    step, the frozen towers included, the median of several. step_megabytes: by how much a step
    raises the peak of memory above what is held between steps. test_images_per_second,
    test_gflop: with the class features computed before (prompts of single images compute theirs
    for each image); a GFLOP is 10**9 multiplications or additions. failed: why there are no
    numbers.
    """

    recipe: str
    prompts: str
    objectives: str
    learned: int
    batch_size: int | None = None
    step_seconds: float | None = None
    step_megabytes: float | None = None
    test_images_per_second: float | None = None
    test_gflop: float | None = None
    teacher: str | None = None
    device: str = ""
    threads: int = 0
    failed: str | None = None


def compare_costs(
    recipes: Sequence[str] | None = None,
    *,
    model: str = "ViT-B-16",
    classes: int = 100,
    teacher: str | None = None,
    options: Mapping[str, Any] | None = None,
    steps: int = 5,
    report: Callable[[Cost], None] = lambda cost: None,
) -> list[Cost]:
    """The cost of each recipe (all by default), measured one after the other, each in a process of
    its own.

    model: any name of open_clip, with random weights, or a bundled model. teacher: likewise, for
    recipes that need one; ``model`` by default. options: over each recipe's own, nested as in
    Config. steps: how many are timed. report: called with each cost as it comes. A recipe that
    can't be measured so has ``failed`` set. Class-agnostic recipes choose from 2000 names. Raises
    UnknownNameError for an unknown recipe, VlfastError for options that do not fit together.
    """
    if classes < 1 or steps < 1:
        name, value = ("classes", classes) if classes < 1 else ("steps", steps)
        raise ValueError(f"{name}: expected at least 1, got {value}")
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "names.txt"
        names.write_text("\n".join(_class_names(DICTIONARY)) + "\n", encoding="utf-8")
        configs = [
            cost_config(name, model=model, teacher=teacher, options=options, dictionary=names)
            for name in (RECIPES if recipes is None else recipes)
        ]
        costs = []
        for config in configs:
            with _forks().Pool(1) as pool:
                arguments = (config, classes, steps, torch.get_num_threads())
                costs.append(pool.apply(_measure_apart, arguments))
            report(costs[-1])
        return costs


def cost_config(
    recipe: str,
    *,
    model: str,
    teacher: str | None = None,
    options: Mapping[str, Any] | None = None,
    dictionary: Path | None = None,
) -> Config:
    """The recipe's config for measuring, with ``options`` over it. A teacher is there only where an
    objective learns from one, or the data or prompts ask for it. dictionary: a file of class names
    for recipes that need one."""
    own = {"recipe": {"name": recipe}, "model": _weights(model)}
    if recipe == "kdpl-ca" and dictionary is not None:
        own["data"] = {"dictionary": str(dictionary)}
    config = resolve_config(merge_options(own, options or {}))
    if _learns_from_teacher(config) and not (options or {}).get("teacher"):
        with_teacher = {**own, "teacher": _weights(teacher or model)}
        config = resolve_config(merge_options(with_teacher, options or {}))
    return config


def measure_cost(
    config: Config, *, classes: int = 100, steps: int = 5, memory: bool = True
) -> Cost:
    """The cost of a config, in this process.

    Its data are replaced by noise: ``classes`` classes, all of them learned from. memory: measure
    it too. On a CPU that sets the C library's allocator to give memory back at
    once, for good, which is slower; hence the processes of ``compare_costs``.
    """
    timer = StepTimer(steps, memory)
    batch = config.recipe.batch_size
    device = resolve_device(config.model.device)
    clip = load_clip(config.model.name, config.model.pretrained, device=device)
    loaders = 4 if device.type == "cuda" else 0
    config = resolve_config(
        merge_options(
            asdict(config),
            {
                "data": {"name": "cost", "classes": "all", "shots": 0, "workers": loaders},
                "recipe": {"epochs": min(1, config.recipe.epochs)},
            },
        )
    )
    data = random_images(classes, batch * timer.needed, clip.image_size)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # The bundled models never saw most of the class names, whose features cost the same.
        warnings.simplefilter("ignore", UserWarning)
        config.output = str(Path(folder) / "run")
        run = train(config, clip=clip, dataset=data, show_progress=False, on_step=timer)
        result = run.result
        speed, gflop = cost_at_test(run.classifier, steps)
    trains = config.recipe.epochs > 0
    return Cost(
        recipe=config.recipe.name,
        prompts=config.prompts.kind,
        objectives=" + ".join(o["kind"] for o in config.objectives) if trains else "",
        learned=timer.learned,
        batch_size=batch if trains else None,
        step_seconds=timer.seconds,
        step_megabytes=timer.megabytes,
        test_images_per_second=speed,
        test_gflop=gflop,
        teacher=config.teacher.name,
        device=result["device"],
        threads=result["threads"],
    )


class StepTimer:
    """Called after each training step: times ``steps`` of them after a warm-up, then measures the
    memory of one."""

    def __init__(self, steps: int, memory: bool) -> None:
        self.learned = 0
        self.needed = WARM_UP + steps + (2 if memory else 1)
        self._timed = range(WARM_UP + 1, WARM_UP + steps + 1)
        self._memory = memory
        self._times: list[float] = []
        self._before = self._after = self._last = 0.0

    def __call__(self, training: TrainingStep, number: int) -> None:
        cuda = next(training.parameters()).is_cuda
        if cuda:
            torch.cuda.synchronize()
        if number in self._timed:
            self._times.append(time.perf_counter() - self._last)
        elif number == 1:
            self.learned = sum(p.numel() for p in training.parameters() if p.requires_grad)
        elif number == self._timed.stop and self._memory:
            # The frozen towers have no next images at the last step, hence not that one.
            self._after = _peak_memory(cuda)
        if number == self._timed.stop - 1 and self._memory:
            self._before = _reset_peak(cuda)
        self._last = time.perf_counter()

    @property
    def seconds(self) -> float | None:
        return statistics.median(self._times) if self._times else None

    @property
    def megabytes(self) -> float | None:
        return (self._after - self._before) / 1e6 if self._before and self._after else None


@torch.no_grad()
def cost_at_test(classifier: PromptedClassifier, repeats: int) -> tuple[float, float]:
    """Images a second in batches of 32, and GFLOP an image, class features computed before.

    repeats: batches that are timed at least; the median counts.
    """
    clip = classifier.clip
    pixels = torch.rand(TEST_BATCH, 3, clip.image_size, clip.image_size, device=clip.device)

    def answer(images: Tensor) -> None:
        classifier.predict(classifier.encode_images(images))
        if clip.device.type == "cuda":
            torch.cuda.synchronize()

    answer(pixels)
    times: list[float] = []
    while len(times) < repeats or (sum(times) < SECONDS_OF_TEST and len(times) < 100):
        start = time.perf_counter()
        answer(pixels)
        times.append(time.perf_counter() - start)
    with _countable(), FlopCounterMode(display=False) as counter:
        answer(pixels[:1])
    return TEST_BATCH / statistics.median(times), counter.get_total_flops() / 1e9


def cost_table(costs: Sequence[Cost], *, markdown: bool = False) -> str:
    """One line a recipe, "-" for what it has not."""
    header = ["recipe", "prompts", "objectives", "learned", "batch", "ms a step", "MB a step"]
    header += ["test images/s", "GFLOP an image"]
    rows = []
    for cost in costs:
        cells = [cost.recipe, cost.prompts, cost.objectives or "-", f"{cost.learned:,}"]
        if cost.failed:
            rows.append([*cells[:3], *["-"] * 6])
            continue
        seconds, speed = cost.step_seconds, cost.test_images_per_second
        cells.append(_cell(cost.batch_size, "d"))
        cells.append(_cell(None if seconds is None else 1e3 * seconds, ",.1f"))
        cells += [_cell(cost.step_megabytes, ",.0f"), _cell(speed, ",.1f")]
        rows.append([*cells, _cell(cost.test_gflop, ",.2f")])
    if not markdown:
        return text_table(header, rows)
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def about(costs: Sequence[Cost], model: str, classes: int) -> str:
    """What was measured on what, the teachers, and why a recipe has no numbers."""
    untrained = "" if _weights(model)["pretrained"] is None else ", random weights"
    lines = [f"{model}{untrained}, {classes} classes"]
    done = [cost for cost in costs if not cost.failed]
    if done:
        lines[0] += f"; {done[0].device}, {done[0].threads} threads"
    for teacher in dict.fromkeys(cost.teacher for cost in done if cost.teacher):
        taught = ", ".join(cost.recipe for cost in done if cost.teacher == teacher)
        lines.append(f"teacher of {taught}: {teacher}")
    lines += [f"{cost.recipe}: not measured, {cost.failed}" for cost in costs if cost.failed]
    return "\n".join(lines)


def write_costs(costs: Sequence[Cost], path: str | Path, note: str) -> None:
    """Write .csv or .json with the numbers as they are, or .md with the table and ``note``."""
    path = Path(path)
    rows = [asdict(cost) for cost in costs]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Cost)])
            writer.writeheader()
            writer.writerows(rows)
    else:
        table = cost_table(costs, markdown=True)
        path.write_text(f"{table}\n\n{note}\n", encoding="utf-8")


class RandomImages:
    """An ImageSource of noise: one image, whichever is asked for, in one piece for a batch."""

    renders_views = True

    def __init__(self, count: int, image_size: int) -> None:
        self.count = count
        self.image_size = image_size
        shape = (image_size, image_size, 3)
        self._noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, view: int | None = None) -> Image.Image:
        return Image.fromarray(self._noise)

    def load_batch(self, indices: Sequence[int], views: Sequence[int | None]) -> Tensor:
        image = torch.from_numpy(self._noise).permute(2, 0, 1)
        return image.expand(len(indices), -1, -1, -1)

    def key(self, index: int) -> str:
        return str(index)


def random_images(classes: int, train: int, image_size: int) -> Dataset:
    """A dataset of noise, ``train`` images in all, with class names of two words."""
    whole = Split(RandomImages(train, image_size), np.arange(train), np.arange(train) % classes)
    none = whole.at([])
    return Dataset(
        name="cost",
        classnames=_class_names(classes),
        template="a photo of a {}.",
        train=whole,
        val=none,
        test=none,
        context_init="a photo of a",
    )


def _class_names(count: int) -> tuple[str, ...]:
    names = [f"{_ADJECTIVES[i % 20]} {_NOUNS[i % 31]}" for i in range(count)]
    return tuple(name if i < 20 * 31 else f"{name} {i}" for i, name in enumerate(names))


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _weights(model: str) -> dict[str, str | None]:
    """A model's config: bundled ones have weights, others get random ones."""
    from vlfast.clip.bundled import BUNDLED

    return {"name": model, "pretrained": None if model in BUNDLED else UNTRAINED}


def _learns_from_teacher(config: Config) -> bool:
    from vlfast.objectives import build_objectives

    asked = config.data.dictionary is not None or config.prompts.class_features == "teacher"
    return asked or any(o.needs_teacher for o in build_objectives(config.objectives))


def _measure_apart(config: Config, classes: int, steps: int, threads: int) -> Cost:
    torch.set_num_threads(threads)
    try:
        return measure_cost(config, classes=classes, steps=steps)
    except (VlfastError, ValueError, OSError, torch.OutOfMemoryError) as error:
        objectives = " + ".join(o["kind"] for o in config.objectives)
        failed = " ".join(str(error).split()) or type(error).__name__
        return Cost(config.recipe.name, config.prompts.kind, objectives, learned=0, failed=failed)


def _forks() -> multiprocessing.context.BaseContext:
    """Processes that begin with everything imported and nothing run."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "open_clip", __name__])
    return context


@contextmanager
def _countable() -> Any:
    """Without the fused encoder block, in which the counter sees nothing."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _reset_peak(cuda: bool) -> float:
    """Begin a new peak; what is held now, in bytes, or 0 where it can't be told."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        # Freed blocks go back to the system, so that a step's memory shows, and not a past one's.
        libc.mallopt(mmap_threshold, 65536)
        libc.mallopt(trim_threshold, 65536)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return 0.0
    return _peak_memory(cuda)


def _peak_memory(cuda: bool) -> float:
    if cuda:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
