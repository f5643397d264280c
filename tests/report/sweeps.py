"""Folders of finished runs as `vlfast run` leaves them, with scores that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from vlfast.evaluation.metrics import harmonic_mean
from vlfast.evaluation.predictions import Predictions, to_tensors
from vlfast.protocols.results import CELL, evaluation_file
from vlfast.trainers.recipes import resolve_config
from vlfast.trainers.run_folder import PREDICTIONS, RunFolder

VERSIONS = {"vlfast": "0.1.0", "torch": "2.11.0", "open_clip_torch": "3.2.0", "python": "3.11.9"}


def score(accuracy: float, images: int = 100) -> dict[str, Any]:
    return {"accuracy": accuracy, "macro_f1": accuracy - 1.0, "images": images}


def write_run(
    root: Path,
    protocol: str,
    recipe: str,
    dataset: str,
    accuracy: float | tuple[float, float],
    *,
    seed: int = 1,
    shots: int = 16,
    source: str | None = None,
    model: str = "ViT-B-16",
    pretrained: str | None = "openai",
    targets: Mapping[str, float] | None = None,
    domains: Mapping[str, float] | None = None,
    images: int = 100,
    classnames: tuple[str, ...] = ("cat", "dog", "a_b & c"),
    predictions: Mapping[str, Predictions] | None = None,
    losses: tuple[float, ...] = (2.0, 1.0, 0.5),
    fingerprint: str | None = None,
    versions: Mapping[str, str] = VERSIONS,
    finished: bool = True,
) -> Path:
    """One run's folder. accuracy: of the test set, or (base, new). targets: accuracies of the tests
    on other datasets. predictions: by test set; by default some are made."""
    classes = "base" if isinstance(accuracy, tuple) else "all"
    data = {"name": dataset, "root": "/data", "shots": shots, "classes": classes}
    config = resolve_config(
        {
            "recipe": recipe,
            "data": data,
            "model": {"name": model, "pretrained": pretrained},
            "seed": seed,
        }
    )
    trained = recipe not in ("zeroshot", "zeroshot-ensemble")
    epochs = len(losses) if trained else 0
    folder = RunFolder(root / dataset.replace("/", "-") / f"{recipe}-{shots}shots-seed{seed}")
    folder.start(config)
    cell = {"protocol": protocol, "method": recipe, "source": source or dataset, "dataset": dataset}
    cell |= {"shots": shots, "seed": seed, "given": {}}
    (folder.path / CELL).write_text(yaml.safe_dump(cell))
    for epoch, loss in enumerate(losses[:epochs], 1):
        folder.append_metrics({"epoch": epoch, "lr": 0.002, "loss": loss, "labels": loss})
    if not finished:
        return folder.path
    if isinstance(accuracy, tuple):
        base, new = accuracy
        of_own = {
            "base": score(base, images),
            "new": score(new, images),
            "harmonic_mean": harmonic_mean(base, new),
        }
    else:
        of_own = {"test": score(accuracy, images)}
    if domains:
        of_own["domains"] = {name: {"test": score(value)} for name, value in domains.items()}
    if predictions is None:
        parts = [part for part in of_own if part in ("test", "base", "new")]
        predictions = {
            part: make_predictions(of_own[part]["accuracy"], classnames, images, seed)
            for part in parts
        }
    folder.write_tensors(PREDICTIONS, *to_tensors(predictions))
    for target, value in (targets or {}).items():
        _write_evaluation(folder.path, target, value, classnames, images, seed, versions)
    folder.write_result(
        {
            "recipe": recipe,
            "accuracy": of_own,
            "epochs": epochs,
            "best_epoch": None,
            "best": None,
            "train_seconds": 60.0 if trained else 0.0,
            "data": {
                "name": dataset,
                "fingerprint": fingerprint or f"{dataset}-{shots if trained else 'all'}-{seed}",
                "classes": len(classnames),
                "images": {"train": 48, "val": 12, "test": images},
            },
            "seed": seed,
            "device": "A CPU",
            "threads": 1,
            "versions": dict(versions),
        }
    )
    return folder.path


def make_predictions(
    accuracy: float, classnames: tuple[str, ...], images: int, seed: int = 1
) -> Predictions:
    """Images in turn of each class, about ``accuracy`` percent of them right, too sure of it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % len(classnames)
    chance = torch.rand(images, generator=generator)
    hard = 1 - (labels + 1) / (2 * len(classnames))  # later classes are missed more often
    wrong = chance * hard > accuracy / 100 * 0.75
    shift = 1 + torch.randint(
        0, max(1, min(3, len(classnames) - 1)), (images,), generator=generator
    )
    predicted = torch.where(wrong, (labels + shift) % len(classnames), labels)
    confidence = 0.4 + 0.6 * torch.rand(images, generator=generator)
    return Predictions(labels.int(), predicted.int(), confidence, classnames)


def _write_evaluation(
    folder: Path,
    target: str,
    accuracy: float,
    classnames: tuple[str, ...],
    images: int,
    seed: int,
    versions: Mapping[str, str],
) -> None:
    file = evaluation_file(folder, target)
    file.parent.mkdir(exist_ok=True)
    about = {
        "data": {"name": target, "fingerprint": f"{target}-test", "images": {"test": images}},
        "accuracy": {"test": score(accuracy, images)},
        "versions": dict(versions),
        "device": "A CPU",
    }
    file.write_text(json.dumps(about))
    RunFolder(file.parent).write_tensors(
        file.stem, *to_tensors({"test": make_predictions(accuracy, classnames, images, seed)})
    )
