"""`vlfast doctor`: versions, which backend serves which op, and what would make it faster."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from vlfast._extension import extension
from vlfast.ops.backends import backend_report
from vlfast.version import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "open_clip_torch",
    "accelerate",
    "safetensors",
    "jsonargparse",
    "matplotlib",
    "qtawesome",
)


def print_report() -> None:
    """Print it."""
    console = Console()
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts():
        facts.add_row(name, value)
    console.print(facts)
    console.print()
    table = Table("op", "device", "served by", "why")
    for row in backend_report():
        table.add_row(row.op, row.device, row.backend, row.reason)
    console.print(table)
    console.print("reference: the op in plain PyTorch, its definition", highlight=False)
    advice = list(_advice())
    console.print()
    for line in advice or ["Nothing is missing."]:
        console.print(f"- {line}", highlight=False)


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _facts() -> list[tuple[str, str]]:
    facts = [
        ("vlfast", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((package, installed(package) or "not installed") for package in PACKAGES),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            facts.append((f"GPU {i}", f"{torch.cuda.get_device_name(i)}, {major}.{minor}"))
    else:
        facts.append(("GPU", "none that torch can use"))
    native = extension()
    if native is None:
        facts.append(("native extension", "not built"))
    else:
        for key, value in native.build_config().items():
            facts.append((f"native {key}", str(value)))
    return facts


def _advice() -> list[str]:
    """What would make it faster or complete, most telling first."""
    advice = []
    native = extension()
    if native is None:
        advice.append(
            "The ops run on plain PyTorch: install a C++ compiler (g++), then `make rebuild` or "
            "`pip install --force-reinstall --no-deps .` in the source folder."
        )
    elif torch.cuda.is_available() and not native.build_config()["has_cuda"]:
        advice.append(
            "There is a GPU, but the extension has no CUDA kernels: install the CUDA toolkit "
            "(nvcc), then `make rebuild`."
        )
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        advice.append(
            "There is an NVIDIA driver, but this torch can't use the GPU: check that it is a "
            "CUDA build that the driver supports."
        )
    cores = os.cpu_count() or 1
    if torch.get_num_threads() < cores // 2:
        advice.append(
            f"torch uses {torch.get_num_threads()} threads of {cores} cores: see OMP_NUM_THREADS."
        )
    if installed("qtawesome") is None:
        advice.append('The icon datasets and the demo need fonts: pip install "vlfast[demo]".')
    return advice
