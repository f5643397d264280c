"""The native extension vlfast._C: loaded once, and said to be missing once."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch  # noqa: F401  (first: the kernels then run on the OpenMP threads that torch has)

_REINSTALL = "in the source folder: pip install --force-reinstall --no-deps ."

try:
    _extension: ModuleType | None = importlib.import_module("vlfast._C")
    _why_missing = None
except ModuleNotFoundError:
    _extension = None
    _why_missing = (
        "the native extension vlfast._C was not built; install a C++ compiler (g++) and, "
        f"{_REINSTALL}"
    )
except ImportError as error:
    _extension = None
    _why_missing = (
        f"the native extension vlfast._C does not load ({error}); rebuild it, {_REINSTALL}"
    )

_config: dict = _extension.build_config() if _extension else {}
_warned: set[str] = set()


def extension() -> ModuleType | None:
    """The module vlfast._C, or None where it was not built or does not load."""
    return _extension


def cuda_archs() -> str:
    """The GPU architectures that the CUDA kernels were compiled for: "8.0 9.0a"; or nothing."""
    return _config.get("cuda_archs", "")


def why_no_kernels(device_type: str) -> str | None:
    """What is missing before kernels can run on this type of device, and what to do; else None."""
    if _extension is None:
        return _why_missing
    if device_type == "cuda" and not _config["has_cuda"]:
        return (
            "the native extension was built without CUDA; install the CUDA toolkit (nvcc) and, "
            f"{_REINSTALL}"
        )
    return None


def warn_once(reason: str) -> None:
    """Say, once in a process, why plain PyTorch serves instead of a kernel."""
    if reason not in _warned:
        _warned.add(reason)
        # The caller of the public op, which asked backends.kernel_serves through a helper.
        warnings.warn(f"vlfast runs on plain PyTorch, which is slower: {reason}", stacklevel=5)
