"""Runs the kernels of csrc/cuda on the CPU: compiles them, translated, against the headers here."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]

LAUNCH = re.compile(r"([\w:]+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>\s*\(", re.S)
DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+(.*?)(\w+)\[\];")
SHARED = re.compile(r"__shared__\s+(.*?)(\w+)((?:\[\w+\])*);")


def translated(source: str) -> str:
    """CUDA's own syntax as calls of the emulator; line numbers stay."""
    source = LAUNCH.sub(r"emulated::launch(\1, \2, ", source)
    source = DYNAMIC_SHARED.sub(
        r"auto* const \2 = static_cast<\1*>(emulated::dynamic_shared());", source
    )
    return SHARED.sub(
        r"using type_of_\2 = \1[1]\3; auto& \2 = (*static_cast<type_of_\2*>"
        r"(emulated::shared_variable(__FILE__, __LINE__, sizeof(type_of_\2))))[0];",
        source,
    )


def build(folder: Path, sanitize: bool = False) -> ctypes.CDLL:
    """Compiles everything into a library in ``folder`` and loads it."""
    sources = [HERE / "emulator.cpp", HERE / "entry.cpp"]
    for file in [*sorted((CSRC / "cuda").iterdir()), HERE / "mistakes.cu"]:
        if file.parent != HERE and (HERE / file.name).exists():
            continue  # found here instead
        copy = folder / (file.stem + (".cpp" if file.suffix == ".cu" else file.suffix))
        copy.write_text(translated(file.read_text()))
        if copy.suffix == ".cpp":
            sources.append(copy)
    library = folder / "kernels.so"
    flags = [*FLAGS, *(["-O1", *SANITIZERS] if sanitize else ["-O2"])]
    folders = [f"-I{HERE}", f"-I{folder}", f"-I{CSRC / 'include'}"]
    # A sanitizer that is loaded into Python is not for the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    objects, running = [], []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        command = [compiler(), *flags, *folders, "-c", source, "-o", objects[-1]]
        running.append(
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        )
    for process in running:
        _, errors = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(errors)
    subprocess.run([compiler(), *flags, *objects, "-o", library], check=True, env=environment)
    return ctypes.CDLL(str(library))


def compiler() -> str | None:
    return shutil.which("g++")


def sanitizer_environment() -> dict[str, str]:
    """Of a Python process into which a library built with ``sanitize`` can be loaded."""
    libraries = []
    # The sanitizer looks for the C++ runtime when it is loaded, and Python comes without.
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [compiler(), f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        libraries.append(done.stdout.strip())
    return {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
