"""A run's folder: config.yaml, metrics.jsonl, checkpoints of learnable tensors, result.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlfast.errors import VlfastError
from vlfast.trainers.config import Config, build_config
from vlfast.trainers.files import replacing

FORMAT = "vlfast-1"
CHECKPOINTS = ("last", "best")
# libyaml's where it was built in, ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
PREDICTIONS = "predictions"  # of last, for every test image
IMPORTED = "imported.json"  # in the folder of a run that others trained: where it came from


class RunFolder:
    """Reads and writes one run. Files are written aside and renamed, and metrics only appended, so
    that a run that is killed leaves the files of its last finished epoch."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def started(self) -> bool:
        return (self.path / "config.yaml").is_file()

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").is_file()

    @property
    def imported(self) -> bool:
        return (self.path / IMPORTED).is_file()

    def check_free(self) -> None:
        """Raise VlfastError if the folder holds a run."""
        if not self.started:
            return
        if self.imported:
            raise VlfastError(f"output: {self.path} holds an imported run; choose another folder")
        if self.finished:
            raise VlfastError(f"output: {self.path} holds a finished run; choose another folder")
        raise VlfastError(
            f"output: {self.path} holds an unfinished run; go on with it (--resume {self.path}) "
            "or choose another folder"
        )

    def start(self, config: Config) -> None:
        """Make a new run's folder. VlfastError if it holds one already or can't be written."""
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_config(config)
        except OSError as error:
            raise VlfastError(f"output: can't write to {self.path} ({error.strerror})") from error

    def write_config(self, config: Config) -> None:
        text = yaml.safe_dump(asdict(config), sort_keys=False)
        with replacing(self.path / "config.yaml") as path:
            path.write_text(text, encoding="utf-8")

    def read_config(self) -> Config:
        """Raises FileNotFoundError or VlfastError for what is no run's folder."""
        return build_config(self.read_options())

    def read_options(self) -> dict[str, Any]:
        """The config as it lies there, unchecked: reading many is quick. Raises as
        ``read_config``."""
        file = self.path / "config.yaml"
        if not file.is_file():
            raise FileNotFoundError(
                f"run: {self.path} is not a run's folder, it has no config.yaml"
            )
        try:
            values = yaml.load(file.read_text(encoding="utf-8"), _LOADER)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise VlfastError(f"run: {file} is not valid YAML") from error
        if not isinstance(values, dict):
            raise VlfastError(f"run: {file} does not hold a run's config")
        return values

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> None:
        """NAME.safetensors: tensors, and JSON metadata in the header."""
        header = {"format": FORMAT, **{k: json.dumps(v) for k, v in metadata.items()}}
        plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        with replacing(self.path / f"{name}.safetensors") as path:
            path.write_bytes(save(plain, metadata=header))

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and metadata. Raises FileNotFoundError, or VlfastError for a damaged file."""
        return read_tensors(self.path / f"{name}.safetensors")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        rows = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def keep_metrics(self, epochs: int) -> None:
        """Drop the rows of epochs after ``epochs``, and a last row cut short by a kill."""
        rows = [row for row in self.read_metrics() if row["epoch"] <= epochs]
        with replacing(self.path / "metrics.jsonl") as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write_imported(self, about: Mapping[str, Any]) -> None:
        """Say where a run that others trained came from."""
        with replacing(self.path / IMPORTED) as path:
            path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def check_resumable(self) -> None:
        """Raise VlfastError for a run that was trained elsewhere."""
        if self.imported:
            raise VlfastError(
                f"resume: {self.path} was imported and has no training state to go on from; "
                "`vlfast evaluate` tests it, `vlfast train` trains one of its kind"
            )

    def write_result(self, result: Mapping[str, Any]) -> None:
        with replacing(self.path / "result.json") as path:
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    def read_result(self) -> dict[str, Any]:
        file = self.path / "result.json"
        if not file.is_file():
            why = "it was imported; evaluate it" if self.imported else "it is not finished"
            raise FileNotFoundError(f"run: {self.path} has no result.json, {why}")
        return json.loads(file.read_text(encoding="utf-8"))


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of one of our checkpoints; nothing is unpickled."""
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {file}")
    try:
        with safe_open(str(file), framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise VlfastError(
            f"checkpoint: {file} is truncated or is no safetensors file ({error})"
        ) from error
    if header.get("format") != FORMAT:
        raise VlfastError(f"checkpoint: {file} was not written by vlfast")
    return tensors, {k: json.loads(v) for k, v in header.items() if k != "format"}


def load_learned(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a checkpoint's tensors into those of the same name. Raises VlfastError where they do
    not fit."""
    expected = {name: tuple(t.shape) for name, t in into.items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        raise VlfastError(f"checkpoint: {file} holds {found}, but these prompts need {expected}")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(tensors[name])
