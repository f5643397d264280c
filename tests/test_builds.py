"""The tests of the C++ kernels, in builds that are not the one installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
# torch.compile compiles C++ of its own, which has nothing to gain here.
RUN_TESTS = """
import importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("vlfast._C", sys.argv[1])
extension = sys.modules["vlfast._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not compile", *sys.argv[2:]]))
"""
TESTS = [
    f"tests/ops/test_{op}.py"
    for op in ("symmetric_kl", "perplexity", "gated_mixture", "prefix_attention")
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not sys.platform.startswith("linux") or shutil.which("g++") is None,
        reason="needs g++ on Linux",
    ),
]


def build(folder, flags):
    command = [sys.executable, "setup.py", "build_ext"]
    command += [f"--build-lib={folder / 'lib'}", f"--build-temp={folder / 'objects'}"]
    environment = {"CXX": f"g++ {flags}", "VLFAST_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
    (extension,) = (folder / "lib/vlfast").glob("_C.*")
    return extension


def run_tests(extension, **environment):
    done = subprocess.run(
        [sys.executable, "-c", RUN_TESTS, extension, *TESTS],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert " passed" in done.stdout


def test_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    libraries = [library_path(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    run_tests(
        build(tmp_path, SANITIZED),
        LD_PRELOAD=":".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",  # Python's own
        UBSAN_OPTIONS="print_stacktrace=1",
    )


@pytest.mark.parametrize("level", [1, 3], ids=["baseline", "avx2"])
def test_for_older_processors(tmp_path, level):
    run_tests(build(tmp_path, f"-DVLFAST_X86_LEVEL={level}"))


def library_path(name):
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
