"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
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
TESTS = [f"tests/ops/test_{op}.py" for op in ("symmetric_kl", "perplexity", "gated_mixture")]


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs g++ on Linux"
)
def test_the_tests_of_the_kernels_pass_in_a_sanitized_build(tmp_path):
    build = [sys.executable, "setup.py", "build_ext"]
    build += [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'objects'}"]
    compiler = {"CXX": f"g++ {FLAGS}", "VLFAST_CUDA": "0"}
    subprocess.run(build, cwd=ROOT, env=os.environ | compiler, check=True)
    (extension,) = (tmp_path / "lib/vlfast").glob("_C.*")
    libraries = [library_path(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    sanitized = {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN_TESTS, extension, *TESTS],
        cwd=ROOT,
        env=os.environ | sanitized,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert " passed" in done.stdout


def library_path(name):
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
