"""Reading a checkpoint that Dassl's trainers saved, without running what it says."""

from __future__ import annotations

import io
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlfast.errors import VlfastError
from vlfast.restricted_pickle import Admit, RestrictedUnpickler

BEST = "best"
_BEST_FILE = "model-best.pth.tar"
_EPOCH_FILE = "model.pth.tar-"
_NEWEST = "checkpoint"  # the text file that names the last one saved

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_INERT = ("torch.optim", "dassl.optim")
_CONTAINERS = {
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "set"): set,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("torch", "Size"): torch.Size,
}


@dataclass(frozen=True)
class Checkpoint:
    """What a file says.

    tensors: its state dict, as stored (dtype, order), without the "module." of DataParallel. epoch:
    how many epochs were trained, where it is given.
    """

    file: Path
    tensors: dict[str, Tensor]
    epoch: int | None


def checkpoint_file(path: str | Path, epoch: int | str | None = None) -> Path:
    """The file that ``path`` is, or holds: a file; the folder of one model (prompt_learner/,
    MultiModalPromptLearner/, VLPromptLearner/); or the output folder with one of those.

    epoch: of a folder, an integer or "best"; by default what its text file ``checkpoint`` names, or
    the only file. Raises FileNotFoundError, or VlfastError where several could be meant.
    """
    path = Path(path)
    if path.is_file():
        if epoch is not None:
            raise VlfastError(f"epoch: {path} is one file, so there is no epoch to choose")
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint: there is no file or folder {path}")
    found = _model_files(path)
    if not found:
        inner = [folder for folder in sorted(path.iterdir()) if _model_files(folder)]
        if len(inner) > 1:
            names = ", ".join(folder.name for folder in inner)
            raise VlfastError(f"checkpoint: {path} holds several models ({names}); name one")
        if not inner:
            raise FileNotFoundError(
                f"checkpoint: {path} holds no {_EPOCH_FILE}EPOCH and no {_BEST_FILE}"
            )
        path, found = inner[0], _model_files(inner[0])
    names = ", ".join(file.name for file in found)
    if epoch is not None:
        file = path / (_BEST_FILE if epoch == BEST else f"{_EPOCH_FILE}{epoch}")
        if file not in found:
            raise FileNotFoundError(f"epoch: there is no {file}; there are {names}")
        return file
    newest = path / _NEWEST
    if newest.is_file():
        name = newest.read_text(encoding="utf-8", errors="replace").split("\n")[0].strip()
        if path / name in found:
            return path / name
    if len(found) > 1:
        raise VlfastError(f"epoch: {path} holds {names}; say which, with --epoch")
    return found[0]


def _model_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and (file.name == _BEST_FILE or file.name.startswith(_EPOCH_FILE))
    )


def read_checkpoint(file: str | Path) -> Checkpoint:
    """Read a checkpoint in either format of ``torch.save``.

    Beside tensors and containers such files hold the optimizer's state and a scheduler object,
    which come to nothing here. Raises FileNotFoundError, or VlfastError for a file that is
    truncated, is something else, or asks for anything else, naming it; nothing of it is run.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {file}")
    held = _load(file)
    state = held.get("state_dict") if isinstance(held, dict) else None
    if not isinstance(state, dict) or not state:
        raise VlfastError(
            f"checkpoint: {file} has no state_dict; expected a file that Dassl's trainer saved, "
            "with state_dict, epoch, optimizer and scheduler"
        )
    tensors = {}
    for name, tensor in dict.items(state):
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise VlfastError(
                f"checkpoint: state_dict of {file} holds {type(tensor).__name__} as {name!r}, "
                "expected tensors by name"
            )
        tensors[name.removeprefix("module.")] = tensor
    epoch = dict.get(held, "epoch")
    return Checkpoint(file, tensors, epoch if type(epoch) is int and epoch >= 0 else None)


def _load(file: Path) -> Any:
    what = f"checkpoint: {file}"
    with open(file, "rb") as opened:
        start = opened.read(len(_ZIP))
    source: Any = str(file)
    try:
        if start == _ZIP:
            names = torch._C.PyTorchFileReader(source).get_all_records()
            if "constants.pkl" in names:
                # torch.load hands these to torch.jit.load, past the unpickler that it is given.
                raise VlfastError(f"{what} is a TorchScript program, not a checkpoint")
        elif start.startswith(_PICKLE):
            # From memory, since torch.load takes an open file for a tar archive if it can be one.
            source = io.BytesIO(file.read_bytes())
        else:
            raise VlfastError(f"{what} is no file of torch.save")
        return torch.load(
            source, map_location="cpu", weights_only=False, pickle_module=_pickle_module(what)
        )
    except VlfastError:
        raise
    except Exception as error:
        raise VlfastError(f"{what} is truncated or damaged ({_first_sentence(error)})") from error


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". ")[0].rstrip(".")


def _pickle_module(what: str) -> Any:
    """What torch.load needs of a pickle module. Its loaders, of both formats, take storages out of
    the file themselves and ask this for all else."""
    admit = _admitted(what)

    class Unpickler(RestrictedUnpickler):
        def __init__(self, file: Any, **options: Any) -> None:
            super().__init__(file, admit, what, **options)

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(__name__="vlfast", Unpickler=Unpickler, load=load)


def _admitted(what: str) -> Admit:
    """What such a file may ask for. Made anew for each file, since a pickle can set attributes of
    what it is given."""

    class Inert:
        """Stands for objects of an optimizer or a scheduler."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
            return super().__new__(cls)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __setstate__(self, state: Any) -> None:
            pass

    def tensor(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
        """Its hooks and metadata are left out."""
        if not isinstance(storage, torch.storage.TypedStorage):
            raise VlfastError(f"{what} is damaged: a tensor without storage")
        length = storage._untyped_storage.nbytes() // torch._utils._element_size(storage.dtype)
        _check_bounds(length, offset, size, stride, what)
        return torch._utils._rebuild_tensor(storage, offset, size, stride)

    def parameter(data: Tensor, *rest: Any) -> Tensor:
        return data

    class NumpyType:
        """A dtype, of which only its code and byte order are read."""

        def __init__(self, code: str, *rest: Any) -> None:
            self.code = code
            self.order = "="

        def __setstate__(self, state: Any) -> None:
            if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
                self.order = state[1]

    def numpy_scalar(dtype: NumpyType, data: bytes) -> int | float | bool:
        if not isinstance(dtype, NumpyType) or dtype.code not in _NUMBERS:
            code = getattr(dtype, "code", type(dtype).__name__)
            raise VlfastError(f"{what} holds a NumPy scalar of type {code!r}, expected a number")
        kind = np.dtype(dtype.code).newbyteorder(dtype.order)
        return np.frombuffer(data, kind, count=1)[0].item()

    def encode(text: str, encoding: str) -> bytes:
        """How pickle's protocol 2 holds bytes."""
        return text.encode("latin-1")

    admitted: Mapping[tuple[str, str], Any] = {
        **_CONTAINERS,
        ("collections", "Counter"): Inert,  # the milestones of a scheduler
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("numpy", "dtype"): NumpyType,
        ("numpy.core.multiarray", "scalar"): numpy_scalar,
        ("numpy._core.multiarray", "scalar"): numpy_scalar,
        ("_codecs", "encode"): encode,
    }

    def admit(module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # Python 2's, in protocol 2
        if any(module == room or module.startswith(f"{room}.") for room in _INERT):
            return Inert
        return admitted.get((module, name))

    return admit


_NUMBERS = frozenset(f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)) - {"f1"} | {"b1"}


def _check_bounds(length: int, offset: Any, size: Any, stride: Any, what: str) -> None:
    """Raise VlfastError for a tensor that reaches beyond its storage of ``length`` elements."""
    numbers = (offset, *size, *stride)
    whole = all(type(number) is int and number >= 0 for number in numbers)
    if whole and len(size) == len(stride):
        if 0 in size:
            return
        if offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) < length:
            return
    raise VlfastError(f"{what} is damaged: a tensor reaches beyond what is stored of it")
