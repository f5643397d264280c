"""Image features of test splits, computed once for all that the same frozen image tower tests."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vlfast.clip.feature_cache import autocast_mode
from vlfast.clip.models import ClipModel
from vlfast.data.dataset import Split
from vlfast.ops.backends import reference_must_serve
from vlfast.prompts.classifier import PromptedClassifier
from vlfast.trainers.feature_store import hash_of_weights
from vlfast.trainers.images import encode_split, view_config
from vlfast.version import __version__

PROBED = 16  # images of a split whose pixels tell it from others


class KeptFeatures:
    """Keeps the features of every split that it encoded: in memory and, with a folder, in one file
    a split there, for other processes, which may write at the same time.

    A file is named after all that its numbers depend on: the image tower's weights and
    preprocessing, the images and their order, the kind of device, autocast, whether the reference
    serves, and the versions of vlfast and torch. So they are bit for bit what encoding would give.
    To a folder that can't be written to, nothing is added.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        # The objects that a key speaks of are kept alive with the features.
        self._in_memory: dict[Any, tuple[Tensor, Any]] = {}
        self._weights: dict[int, str] = {}

    def encode(
        self, classifier: PromptedClassifier, split: Split, *, workers: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """What ``encode_split`` gives. Nothing is kept where prompts change image features."""
        if classifier.prompts.learns_images:
            return encode_split(classifier, split, workers=workers)
        clip = classifier.clip
        how = (autocast_mode(), reference_must_serve())
        key = (id(clip.model.visual), id(split.source), split.indices.tobytes(), how)
        if key not in self._in_memory:
            features = self._in_folder(classifier, split, workers)
            self._in_memory[key] = features, (clip.model.visual, split.source)
        return self._in_memory[key][0], torch.from_numpy(split.labels).to(clip.device)

    def _in_folder(
        self, classifier: PromptedClassifier, split: Split, workers: int | None
    ) -> Tensor:
        if self.folder is None:
            return encode_split(classifier, split, workers=workers)[0]
        file = self.folder / f"{self._name(classifier.clip, split)}.safetensors"
        features = _read(file, len(split))
        if features is None:
            features, _ = encode_split(classifier, split, workers=workers)
            _write(file, features)
        return features.to(classifier.clip.device)

    def _name(self, clip: ClipModel, split: Split) -> str:
        visual = clip.model.visual
        if id(visual) not in self._weights:
            self._weights[id(visual)] = hash_of_weights(visual)
        about = [
            self._weights[id(visual)],
            list(astuple(view_config(clip))),
            _device_name(clip.device),
            [__version__, torch.__version__],
            [list(map(str, autocast_mode())), reference_must_serve()],
            _about_images(split),
        ]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def _read(file: Path, rows: int) -> Tensor | None:
    try:
        features = load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None  # not there, or damaged: it is made anew
    return features if len(features) == rows else None


def _write(file: Path, features: Tensor) -> None:
    aside = file.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(save({"features": features.cpu().contiguous()}))
        os.replace(aside, file)
    except OSError as error:
        warnings.warn(
            f"data.test_features: can't write to {file.parent} ({error}), so other runs will "
            "encode these images again",
            stacklevel=2,
        )
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _about_images(split: Split) -> list[Any]:
    """The images and their order: keys, of files also where they lie, their size and the time of
    their last change, and the pixels of a few."""
    source = split.source
    keys = [source.key(int(i)) for i in split.indices]
    root = getattr(source, "root", None)
    files = None if root is None else [_stamp(Path(root) / key) for key in keys]
    pixels = hashlib.sha256()
    for position in np.linspace(0, len(split) - 1, min(PROBED, len(split))).round().astype(int):
        pixels.update(split.image(position).tobytes())
    return [keys, str(root), files, pixels.hexdigest()]


def _stamp(file: Path) -> list[int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
