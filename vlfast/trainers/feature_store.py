"""Features of frozen models on disk: of every view of the training images, and of the classes.

A folder holds manifest.json (what they were made from, and the sha256 of every file),
images.json (the images' keys, in the order of the rows), view-0001.safetensors and so on ("frozen"
[N, D], not normalised; with a teacher "teacher" [N, D_t], normalised) and, with a teacher,
classes.safetensors ("features" [C, D_t], normalised).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vlfast.clip.models import ClipModel
from vlfast.data.dataset import Dataset, Split
from vlfast.errors import VlfastError
from vlfast.trainers.config import Config
from vlfast.trainers.files import replacing

FORMAT = "vlfast-features-1"
DTYPES = {"fp32": ("F32", np.float32), "fp16": ("F16", np.float16)}
HASHED_AT_ONCE = 1 << 20

About = dict[str, Any]


def about_data(config: Config, dataset: Dataset, fingerprint: str, clip: ClipModel) -> About:
    """What the views of the training images depend on. clip: whose preprocessing they have."""
    return {
        "dataset": dataset.name,
        "fingerprint": fingerprint,
        "shots": config.data.shots,
        "seed": config.seed,
        "augment": config.data.augment,
        "size": clip.image_size,
        "mean": list(clip.mean),
        "std": list(clip.std),
        "interpolation": clip.interpolation,
        "precision": config.model.precision,
    }


def about_model(clip: ClipModel) -> About:
    """The image tower that the frozen features come from."""
    return {
        "name": clip.name,
        "pretrained": clip.pretrained,
        "weights": hash_of_weights(clip.model.visual),
    }


def hash_of_weights(*modules: nn.Module) -> str:
    """A hash of these modules' parameters and buffers, and of the classes they are built from.
    16 hexadecimal digits."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(json.dumps([type(part).__name__ for part in module.modules()]).encode())
        for name, tensor in module.state_dict().items():
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class FeatureStore:
    """Reads a folder that ``store_features`` wrote. Rows are mapped into memory, not loaded.

    option: what the folder was given as, for messages. Raises FileNotFoundError, or VlfastError
    for a folder that is damaged or of something else.
    """

    def __init__(self, path: str | Path, option: str = "data.features") -> None:
        self.path = Path(path).absolute()
        self.option = option
        self.manifest = _read_manifest(self.path, option)
        self._checked: set[str] = set()

    @property
    def views(self) -> int:
        """How many views are there, from the first on."""
        count = 0
        while _view_file(count + 1) in self.manifest["files"]:
            count += 1
        return count

    @property
    def teacher(self) -> About | None:
        """{name, pretrained, run, weights, template, logit_scale}, or None without a teacher."""
        return self.manifest["teacher"]

    def check(self, views: int | None = None, **expected: About) -> None:
        """Raise VlfastError, saying what differs, where the folder was made from other ``data``,
        another ``model`` or ``teacher``, or where one of the first ``views`` is missing."""
        differences = []
        for part, values in expected.items():
            found = self.manifest[part]
            if found is None:
                raise VlfastError(f"{self.option}: {self.path} holds no features of a {part}")
            differences += [
                f"{part} {key} is {_shown(found, key)} there, {_shown(values, key)} here"
                for key in values
                if key not in _TELLS_NOTHING and found.get(key) != values[key]
            ]
        if differences:
            raise VlfastError(
                f"{self.option}: {self.path} was made for another run: {'; '.join(differences)}"
            )
        if views is not None and self.views < views:
            raise VlfastError(
                f"{self.option}: {self.path} has {self.views} finished views, but this run needs "
                f"{views}; `vlfast features` makes those that are missing"
            )

    def verify(self, names: Iterable[str]) -> None:
        """Compare files with their checksums, each once. VlfastError naming one that differs."""
        for name in names:
            if name in self._checked:
                continue
            if name not in self.manifest["files"]:
                raise VlfastError(f"{self.option}: {self.path} is not finished, it has no {name}")
            if not _is_whole(self.path / name, self.manifest["files"][name]):
                raise VlfastError(
                    f"{self.option}: {self.path / name} is missing or damaged, its checksum is not "
                    "that of the manifest; `vlfast features` makes it anew"
                )
            self._checked.add(name)

    def open_views(self, views: int) -> None:
        """Verify what ``rows_of`` and ``read`` need for the first ``views``."""
        self.verify(["images.json", *map(_view_file, range(1, views + 1))])

    def rows_of(self, split: Split) -> np.ndarray:
        """Where the images of ``split`` stand, int64 [N]. VlfastError for an image that is not
        there."""
        keys = json.loads((self.path / "images.json").read_text(encoding="utf-8"))
        row_of = {key: row for row, key in enumerate(keys)}
        wanted = [split.source.key(int(i)) for i in split.indices]
        missing = [key for key in wanted if key not in row_of]
        if missing:
            raise VlfastError(
                f"{self.option}: {self.path} lacks the features of {len(missing)} of {len(wanted)} "
                f"training images, {missing[0]!r} for one"
            )
        return np.array([row_of[key] for key in wanted], dtype=np.int64)

    def read(self, part: str, view: int, rows: np.ndarray) -> Tensor:
        """fp32 [B, D] of "frozen" or "teacher" in this view."""
        name = _view_file(view)
        mapped = _mapped(str(self.path / name), part, self.manifest["files"][name])
        return torch.from_numpy(mapped[rows].astype(np.float32, copy=False))

    def class_features(self) -> tuple[tuple[str, ...], Tensor]:
        """Class names, and the teacher's normalised features of them, fp32 [C, D_t]."""
        if self.teacher is None:
            raise VlfastError(f"{self.option}: {self.path} holds no features of a teacher")
        self.verify(["classes.safetensors"])
        features = load_file(self.path / "classes.safetensors")["features"]
        return tuple(self.manifest["classnames"]), features


# Encodes [B, 3, S, S] to {"frozen": [B, D], "teacher": [B, D_t]}.
Encode = Callable[[Tensor], Mapping[str, Tensor]]
# The pixels of one view of all images, in order.
PixelsOf = Callable[[int], Iterable[Tensor]]


class FeatureWriter:
    """Writes such a folder, one view after the other; what is finished stays where it is.

    about: {data, model, teacher, classnames, dtype} of the manifest. Raises VlfastError for a
    folder that holds something else.
    """

    def __init__(self, path: str | Path, about: About) -> None:
        self.path = Path(path).absolute()
        self.manifest = {"format": FORMAT, **about, "files": {}}
        if (self.path / "manifest.json").is_file():
            store = FeatureStore(self.path, "output")
            parts = {part: about[part] for part in ("data", "model", "teacher")}
            if (store.teacher is None) != (about["teacher"] is None):
                how = "without" if store.teacher is None else "with"
                raise VlfastError(
                    f"output: {self.path} was made {how} a teacher; name the same models again, or "
                    "another folder"
                )
            store.check(**{part: value for part, value in parts.items() if value is not None})
            for name in ("dtype", "classnames"):
                if store.manifest[name] != about[name]:
                    raise VlfastError(
                        f"output: {self.path} was made with {name} {store.manifest[name]}, "
                        f"got {about[name]}"
                    )
            self.manifest["files"] = {
                name: checksum
                for name, checksum in store.manifest["files"].items()
                if _is_whole(self.path / name, checksum)
            }
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise VlfastError(
                f"output: {self.path} is no empty folder, and no folder of stored features"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_manifest()
        except OSError as error:
            raise VlfastError(f"output: can't write to {self.path} ({error.strerror})") from error

    def missing(self, views: int) -> list[int]:
        """Which of the first ``views`` are to be made."""
        numbers = range(1, views + 1)
        return [number for number in numbers if _view_file(number) not in self.manifest["files"]]

    def write_images(self, split: Split) -> None:
        if "images.json" not in self.manifest["files"]:
            keys = [split.source.key(int(i)) for i in split.indices]
            with self._finishing("images.json") as file:
                file.write_text(json.dumps(keys), encoding="utf-8")

    def write_classes(self, features: Callable[[], Tensor]) -> None:
        if "classes.safetensors" not in self.manifest["files"]:
            with self._finishing("classes.safetensors") as file:
                file.write_bytes(save({"features": features().detach().cpu().contiguous()}))

    def write_view(self, view: int, chunks: Iterable[Mapping[str, Tensor]], images: int) -> None:
        """chunks: of rows, in order, by part. Raises VlfastError for numbers that are not finite in
        the stored precision."""
        with self._finishing(_view_file(view)) as file:
            maps: dict[str, np.ndarray] = {}
            start = 0
            for chunk in chunks:
                if not maps:
                    widths = {part: rows.shape[1] for part, rows in chunk.items()}
                    maps = _created(file, images, widths, self.manifest["dtype"])
                for part, rows in chunk.items():
                    stop = start + len(rows)
                    with np.errstate(over="ignore"):  # it is looked for below
                        written = rows.float().cpu().numpy().astype(maps[part].dtype)
                    if not np.isfinite(written).all():
                        raise VlfastError(
                            f"features: {part} features of view {view} are infinite or NaN in "
                            f"{self.manifest['dtype']}; fp32 may help, as dtype or precision"
                        )
                    maps[part][start:stop] = written
                start = stop
            for mapped in maps.values():
                mapped.flush()

    @contextmanager
    def _finishing(self, name: str) -> Iterator[Path]:
        """A file to write aside, which counts once it is whole."""
        with replacing(self.path / name) as aside:
            yield aside
        self.manifest["files"][name] = _checksum(self.path / name)
        self._write_manifest()

    def _write_manifest(self) -> None:
        with replacing(self.path / "manifest.json") as aside:
            aside.write_text(json.dumps(self.manifest, indent=2) + "\n", encoding="utf-8")


# The same weights may lie in another place; the weights' hash decides.
_TELLS_NOTHING = frozenset(("name", "pretrained", "run", "logit_scale"))
_PARTS = {"data": dict, "model": dict, "classnames": list, "dtype": str, "files": dict}


def _read_manifest(path: Path, option: str) -> About:
    file = path / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{option}: {path} is no folder of `vlfast features`, it has no manifest.json"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VlfastError(f"{option}: {file} is damaged ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise VlfastError(f"{option}: {file} was not written by this version of vlfast")
    wrong = [name for name, kind in _PARTS.items() if not isinstance(manifest.get(name), kind)]
    if wrong or "teacher" not in manifest or manifest["dtype"] not in DTYPES:
        raise VlfastError(f"{option}: {file} is damaged ({', '.join(wrong) or 'dtype or teacher'})")
    return manifest


def _shown(about: About, key: str) -> str:
    value = repr(about.get(key))
    return f"{value} ({about['name']})" if "name" in about else value


def _view_file(number: int) -> str:
    return f"view-{number:04}.safetensors"


def _is_whole(file: Path, checksum: str) -> bool:
    return file.is_file() and _checksum(file) == checksum


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(HASHED_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def _created(file: Path, rows: int, widths: Mapping[str, int], dtype: str) -> dict[str, np.ndarray]:
    """A new safetensors file, its tensors [rows, width] mapped for writing: a view of a large
    dataset need not fit in memory."""
    name, kind = DTYPES[dtype]
    header: dict[str, Any] = {}
    end = 0
    for part, width in widths.items():
        start, end = end, end + rows * width * np.dtype(kind).itemsize
        header[part] = {"dtype": name, "shape": [rows, width], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)
    return {
        part: np.memmap(
            file, kind, "r+", 8 + len(text) + header[part]["data_offsets"][0], (rows, width)
        )
        for part, width in widths.items()
    }


@lru_cache(maxsize=64)
def _mapped(file: str, part: str, checksum: str) -> np.ndarray:
    """A tensor of a safetensors file, [N, D], mapped for reading; per process, so that workers
    that load images open it for themselves. checksum: another one means another file."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        about = json.loads(opened.read(length))[part]
    kinds = dict(DTYPES.values())
    offset = 8 + length + about["data_offsets"][0]
    return np.memmap(file, kinds[about["dtype"]], "r", offset, tuple(about["shape"]))
