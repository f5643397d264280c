"""What pyproject.toml cannot say: the native extension, where this machine can build it."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "tools"))

from build_extension import BuildExtension, native_extensions

setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildExtension})
