"""`vlfast demo`: zero-shot, CoOp and CoOp+PLPP on icons, base-to-new, in minutes on a CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from vlfast.clip.models import load_clip
from vlfast.clip.words import nearest_words
from vlfast.data.catalog import load_dataset
from vlfast.data.dataset import Dataset
from vlfast.evaluation.plots import Example, Guess, plot_predictions, plot_training
from vlfast.evaluation.tables import base_new_cells, text_table
from vlfast.run import Run, train
from vlfast.trainers.device import resolve_device
from vlfast.trainers.recipes import resolve_config

METHODS = {"zeroshot": "zero-shot", "coop": "CoOp", "plpp": "CoOp+PLPP"}
MODEL = "glyphs-student"


def run_demo(theme: str, output: str | Path, *, epochs: int | None = None, seed: int = 1) -> None:
    """Train the three, print their table and their contexts as words, write two pictures.

    theme: which icons (see ``vlfast.data.glyphs.THEMES``). output: its folder, made anew. epochs:
    instead of the recipes' own.
    """
    output = Path(output)
    dataset = load_dataset(f"glyphs/{theme}")
    clip = load_clip(MODEL, device=resolve_device("auto"))
    base = dataset.restrict("base")
    print(
        f"{dataset.name}: {dataset.num_classes} classes, {base.num_classes} of them base; "
        f"{MODEL} learns from 16 images of each base class and is tested on drawings by other "
        "hands, of base classes and of the new ones\n"
    )
    runs: dict[str, Run] = {}
    for recipe, name in METHODS.items():
        print(f"{name} ...", flush=True)
        folder = output / recipe
        if (folder / "config.yaml").is_file():
            shutil.rmtree(folder)
        given = {
            "recipe": {"name": recipe},
            "model": {"name": MODEL},
            "data": {"name": dataset.name, "classes": "base"},
            "seed": seed,
            "output": str(folder),
        }
        if epochs is not None and recipe != "zeroshot":
            given["recipe"]["epochs"] = epochs
        runs[name] = train(resolve_config(given), clip=clip, dataset=dataset)

    print("\n" + _table(runs) + "\n")
    for name, run in runs.items():
        vectors = run.classifier.prompts.context_vectors()
        if vectors is not None:
            print(_context_lines(name, run.config.prompts.init, nearest_words(clip, vectors)))
    curves = {name: run.folder.read_metrics() for name, run in runs.items()}
    curves = {name: rows for name, rows in curves.items() if rows}
    plot_training(curves, output / "training.png")
    plot_predictions(
        _examples(runs, dataset),
        output / "predictions.png",
        title=f"{dataset.name}: test images on which the methods differ (green is right)",
    )
    print(f"\npictures: {output / 'training.png'}, {output / 'predictions.png'}")


def _table(runs: dict[str, Run]) -> str:
    header = ["accuracy, %", "base", "new", "harmonic mean", "seconds"]
    rows = []
    domains: list[list[str]] = []
    for name, run in runs.items():
        result = run.result
        rows.append([name, *base_new_cells(result["accuracy"]), f"{result['train_seconds']:.1f}"])
        for domain, scores in result["accuracy"].get("domains", {}).items():
            domains.append([f"{name}, drawn as in {domain}", *base_new_cells(scores), ""])
    return text_table(header, [*rows, *sorted(domains, key=lambda row: row[0].split(", ")[1])])


def _context_lines(name: str, init: str | None, words: list[list[tuple[str, float]]]) -> str:
    lines = [f"{name}: nearest words of the learned context (it began as {init!r})"]
    for position, nearest in enumerate(words, start=1):
        listed = ", ".join(f"{word} {distance:.2f}" for word, distance in nearest)
        lines.append(f"  vector {position}: {listed}")
    return "\n".join(lines)


def _agreement(example: Example) -> int:
    """0 where some methods are right and some wrong, 1 where all are right, 2 where none is."""
    right = [guess.classname == example.classname for guess in example.guesses]
    return 1 if all(right) else 0 if any(right) else 2


def _examples(runs: dict[str, Run], dataset: Dataset, count: int = 12) -> list[Example]:
    """Test images of different classes, half base and half new: first those that some method gets
    right and another wrong."""
    examples: list[Example] = []
    for half, wanted in (("base", count - count // 2), ("new", count // 2)):
        part = dataset.restrict(half)
        order = np.random.default_rng(0).permutation(len(part.test))[:200]
        images = [part.test.image(int(i)) for i in order]
        guesses = [
            [Guess(name, p.classnames[0], p.probabilities[0]) for p in found]
            for name, found in (
                (name, run.predict(images, classnames=part.classnames, top_k=1))
                for name, run in runs.items()
            )
        ]
        found = [
            Example(image, part.classnames[int(part.test.labels[i])], half, by_method)
            for image, i, by_method in zip(images, order, zip(*guesses, strict=True), strict=True)
        ]
        by_class: dict[str, Example] = {}
        for example in sorted(found, key=_agreement):
            by_class.setdefault(example.classname, example)
        examples += sorted(by_class.values(), key=_agreement)[:wanted]
    return examples
