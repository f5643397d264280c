"""Builds vlfast._C from csrc with ninja: pybind11 and, where nvcc is found, CUDA. No torch.

Environment: VLFAST_NATIVE=0 builds no extension, VLFAST_CUDA=0 one without CUDA kernels,
VLFAST_CUDA_ARCHS lists the GPU architectures ("8.0 9.0a"), CXX and NVCC name the compilers.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
DEFAULT_CUDA_ARCHS = "8.0 8.6 8.9 9.0 10.0"

# The -fno flags let gcc vectorise selects and change no result. -ffast-math would: it drops NaN,
# and linking with it flushes denormals to zero in the whole process.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-trapping-math", "-fno-math-errno"),
    *("-fvisibility=hidden", "-Wall", "-Wextra"),
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]


class NoCuda(Exception):
    """Why the extension is built without CUDA kernels."""


@dataclass(frozen=True)
class CudaToolkit:
    """nvcc, its static runtime library, and the architectures to compile for."""

    nvcc: str
    version: str
    runtime: Path
    archs: tuple[str, ...]

    def flags(self) -> list[str]:
        """nvcc's flags for machine code of every architecture, and PTX of the newest."""
        flags = []
        for arch in self.archs:
            number = arch.replace(".", "")
            code = f"sm_{number}"
            if arch == self.archs[-1]:
                code = f"[{code},compute_{number}]"
            flags.append(f"-gencode=arch=compute_{number},code={code}")
        return flags


class BuildExtension(build_ext):
    """build_ext that hands the compiling to ninja."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = cxx_compiler()
        try:
            toolkit = cuda_toolkit()
            print(f"vlfast: CUDA {toolkit.version} kernels for {' '.join(toolkit.archs)}")
        except NoCuda as reason:
            toolkit = None
            print(f"vlfast: building without CUDA kernels: {reason}")
        write_build_file(folder / "build.ninja", target, compiler, toolkit)
        run_ninja(folder)


def native_extensions() -> list[Extension]:
    """The extension, or none (and the reason printed) where this machine cannot build it."""
    if reason := why_not_native():
        print(f"vlfast: building without the native extension: {reason}")
        return []
    return [Extension("vlfast._C", [str(path.relative_to(ROOT)) for path in sources(".cpp")])]


def why_not_native() -> str | None:
    if os.environ.get("VLFAST_NATIVE") == "0":
        return "VLFAST_NATIVE=0"
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, and this is {sys.platform}"
    if cxx_compiler() is None:
        return "no C++ compiler was found (g++, c++, or the one that CXX names)"
    return None


def sources(suffix: str) -> list[Path]:
    return sorted(CSRC.rglob(f"*{suffix}"))


def cxx_compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def cuda_toolkit() -> CudaToolkit:
    """The CUDA toolkit to build with. Raises NoCuda where there is none that serves."""
    nvcc = find_nvcc()
    version = nvcc_version(nvcc)
    runtime = find_static_runtime(nvcc, version)
    if runtime is None:
        raise NoCuda(f"{nvcc} (CUDA {version}) came without libcudart_static.a")
    return CudaToolkit(nvcc, version, runtime, cuda_archs(nvcc))


def cuda_runtime_requirement() -> list[str]:
    """The package that holds libcudart_static.a, if nvcc is here and the library is not."""
    if why_not_native():
        return []
    try:
        nvcc = find_nvcc()
        version = nvcc_version(nvcc)
    except NoCuda:
        return []
    # Before CUDA 13 the package had another name and held the shared library alone.
    if int(version.split(".")[0]) < 13 or find_static_runtime(nvcc, version):
        return []
    return [f"nvidia-cuda-runtime=={version}.*"]


def find_nvcc() -> str:
    if os.environ.get("VLFAST_CUDA") == "0":
        raise NoCuda("VLFAST_CUDA=0")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    in_homes = (shutil.which("nvcc", path=str(Path(home, "bin"))) for home in homes if home)
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or next(filter(None, in_homes), None)
    if nvcc is None:
        raise NoCuda("nvcc was not found (on PATH, in CUDA_HOME, or as NVCC names it)")
    return nvcc


def nvcc_version(nvcc: str) -> str:
    release = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    if release is None:
        raise NoCuda(f"{nvcc} --version names no release")
    return release[1]


def find_static_runtime(nvcc: str, version: str) -> Path | None:
    """libcudart_static.a of the toolkit, or of the nvidia-cuda-runtime package."""
    # nvcc on the PATH may be a wrapper script: only nvcc itself knows where its toolkit stands.
    named = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "--dryrun", "-x", "cu", os.devnull), re.M)
    top = Path(named[1]) if named else Path(nvcc).resolve().parent.parent
    folders = [top / "lib64", top / "lib", *sorted(top.glob("targets/*-linux/lib"))]
    package = importlib.util.find_spec("nvidia")
    if package is not None:
        major = version.split(".")[0]
        folders += [Path(p, f"cu{major}", "lib") for p in package.submodule_search_locations or ()]
    libraries = (folder / "libcudart_static.a" for folder in folders)
    return next((library for library in libraries if library.is_file()), None)


def cuda_archs(nvcc: str) -> tuple[str, ...]:
    """The architectures asked for that this nvcc can compile for, oldest first."""
    asked = re.split(r"[ ,;]+", os.environ.get("VLFAST_CUDA_ARCHS", DEFAULT_CUDA_ARCHS).strip())
    offered = output_of(nvcc, "--list-gpu-code").split()
    archs = [arch for arch in asked if f"sm_{generation(arch)}" in offered]
    if left_out := [arch for arch in asked if arch not in archs]:
        print(f"vlfast: left out, as {nvcc} cannot compile for them: {' '.join(left_out)}")
    if not archs:
        raise NoCuda(f"{nvcc} can compile for none of {' '.join(asked)}")
    return tuple(sorted(archs, key=generation))


def generation(arch: str) -> int:
    """80 for "8.0", 90 for "9.0" and "9.0a"."""
    number = re.fullmatch(r"(\d+)\.(\d)[af]?", arch)
    if number is None:
        raise SystemExit(
            f'VLFAST_CUDA_ARCHS: expected architectures such as "8.0 9.0a", got {arch!r}'
        )
    return int(number[1] + number[2])


def output_of(*command: str) -> str:
    """What a command prints, stdout and stderr together; nothing if it cannot be run."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError:
        return ""
    return done.stdout


def write_build_file(path: Path, target: Path, compiler: str, toolkit: CudaToolkit | None) -> None:
    # Only here, since the reasons not to build are asked for before the requirements are installed.
    import pybind11
    from ninja import ninja_syntax

    config = {
        "VLFAST_CXX_FLAGS": " ".join(CXX_FLAGS),
        "VLFAST_CUDA_VERSION": toolkit.version if toolkit else "",
        "VLFAST_CUDA_ARCHS": " ".join(toolkit.archs) if toolkit else "",
    }
    defines = [f'-D{name}="{value}"' for name, value in config.items()]
    if toolkit:
        defines.append("-DVLFAST_HAS_CUDA")
    headers = [CSRC / "include", sysconfig.get_path("include"), pybind11.get_include()]
    cxx_flags = [*CXX_FLAGS, *defines, *(f"-I{folder}" for folder in headers)]
    with path.open("w") as file:
        ninja = ninja_syntax.Writer(file, width=10_000)
        compile_cxx = f"{compiler} -MMD -MF $out.d {escaped(cxx_flags)} -c $in -o $out"
        ninja.rule("cxx", compile_cxx, depfile="$out.d", deps="gcc")
        objects = [add_object(ninja, "cxx", source) for source in sources(".cpp")]
        libraries = []
        if toolkit:
            flags = [*NVCC_FLAGS, *toolkit.flags(), f"-ccbin={compiler}", f"-I{CSRC / 'include'}"]
            compile_cuda = (
                f"{escaped([toolkit.nvcc])} -MMD -MF $out.d {escaped(flags)} -c $in -o $out"
            )
            ninja.rule("nvcc", compile_cuda, depfile="$out.d", deps="gcc")
            objects += [add_object(ninja, "nvcc", source) for source in sources(".cu")]
            libraries = [str(toolkit.runtime), "-lrt", "-lpthread", "-ldl"]
        # Our copy of the CUDA runtime stays our own: torch has another one in the same process.
        options = ["-shared", "-fopenmp", "-Wl,--exclude-libs,ALL"]
        ninja.rule("link", f"{compiler} $in -o $out {escaped([*options, *libraries])}")
        ninja.build(str(target), "link", objects)


def add_object(ninja: Any, rule: str, source: Path) -> str:
    name = "_".join(source.relative_to(CSRC).parts) + ".o"
    ninja.build(name, rule, str(source))
    return name


def escaped(arguments: list[str]) -> str:
    """Arguments for the shell, inside a ninja file."""
    return shlex.join(arguments).replace("$", "$$")


def run_ninja(folder: Path) -> None:
    import ninja

    command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)]
    if subprocess.run(command).returncode:
        raise CompileError("vlfast._C did not compile: the compiler's messages are above")
