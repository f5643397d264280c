"""The native extension: how it was built, and what happens where it was not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlfast._extension import extension

ROOT = Path(__file__).parent.parent
built = pytest.mark.skipif(extension() is None, reason="vlfast._C is not built here")


def run_python(code, cwd, **environment):
    """Run code in a fresh interpreter, and give back what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@built
def test_build_config():
    config = extension().build_config()
    assert config["compiler"] and config["cpu_dispatch"].endswith("default")
    assert "-O3" in config["cxx_flags"] and "-ffast-math" not in config["cxx_flags"]
    assert config["has_cuda"] == hasattr(extension(), "symmetric_kl_cuda")
    assert config["has_cuda"] == bool(config["cuda_archs"]) == bool(config["cuda_version"])


@built
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_symbol_of_ours_or_of_cuda_is_exported():
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", extension().__file__]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert "PyInit__C" in names
    assert [name for name in names if "cuda" in name.lower() or "vlfast" in name] == []


@built
@pytest.mark.skipif(
    extension() is None or not extension().build_config()["has_cuda"] or torch.cuda.is_available(),
    reason="needs CUDA kernels and no GPU",
)
def test_cuda_kernels_without_a_gpu_say_so():
    with pytest.raises(RuntimeError, match="symmetric_kl_cuda: "):
        extension().symmetric_kl_cuda(0, 0, 0, 0, 1, 1, 1, 1.0, 1.0, 0, 0, 0.5, 0.5, 0, 0, 0, 0)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_cuda_compiles_for_ampere_and_hopper(source, tmp_path):
    flags = [
        *("-std=c++17", "--threads=0", f"-I{ROOT / 'csrc/include'}"),
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    command = ["nvcc", *flags, "-Werror=all-warnings", "-c", source, "-o", tmp_path / "kernel.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


MISSING = """
import sys, warnings
sys.modules["vlfast._C"] = None  # import then fails, as without the file
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from vlfast.ops import symmetric_kl_loss
    from vlfast.ops.backends import backend_report
    of_import = [w for w in caught if "vlfast" in str(w.message)]
    for _ in range(3):
        student = torch.ones(2, 3, requires_grad=True)
        symmetric_kl_loss(student, torch.eye(3)[:2]).backward()
    of_use = [w for w in caught if "vlfast" in str(w.message)]
print(len(of_import), len(of_use), of_use[0].filename, of_use[0].message)
print(next(row for row in backend_report() if row.op == "symmetric_kl").backend)
"""


def test_a_missing_extension_warns_once_and_the_reference_serves():
    warning, backend = run_python(MISSING, ROOT, VLFAST_REFERENCE="0").splitlines()
    assert warning.startswith("0 1 <string> vlfast runs on plain PyTorch, which is slower")
    assert "install a C++ compiler" in warning and "pip install" in warning
    assert backend == "reference"


def test_the_environment_can_ask_for_the_reference():
    code = "from vlfast.ops.backends import backend_report; print(backend_report()[2].backend)"
    assert run_python(code, ROOT, VLFAST_REFERENCE="1").strip() == "reference"


INSTALLED = """
import sys
# An editable install of this checkout would lend its extension to the wheel.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, vlfast
from vlfast._extension import extension
vlfast.symmetric_kl_loss(torch.eye(3), torch.ones(3, 3))
print(vlfast.__file__, extension() is not None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("native", ["1", "0"])
def test_a_wheel_works_from_another_folder(native, tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "runs", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"],
        cwd=source,
        env=os.environ | {"VLFAST_CUDA": "0", "VLFAST_NATIVE": native},
        check=True,
    )
    (wheel,) = source.glob("vlfast-*.whl")
    assert ("none-any" in wheel.name) == (native == "0")
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    file, has_extension = run_python(INSTALLED, tmp_path, PYTHONPATH=str(site)).split()
    assert Path(file).is_relative_to(site)
    assert has_extension == str(native == "1")
