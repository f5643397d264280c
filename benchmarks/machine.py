"""What a benchmark ran on."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch

from vlfast import __version__
from vlfast._extension import extension


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    built = extension()
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "vlfast": __version__,
        "compiler": built.build_config()["compiler"] if built else None,
    }


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def device_slug() -> str:
    """A name for files: the device, and of a processor how many threads were used."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    if torch.cuda.is_available():
        return name
    threads = torch.get_num_threads()
    return f"{name}-{threads}-thread{'s' * (threads > 1)}"


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
