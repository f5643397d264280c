"""The build backend: setuptools, and the CUDA runtime where nvcc came without it."""

from __future__ import annotations

from typing import Any

from build_extension import cuda_runtime_requirement
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    required = build_meta.get_requires_for_build_wheel(config_settings)
    return required + cuda_runtime_requirement()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    required = build_meta.get_requires_for_build_editable(config_settings)
    return required + cuda_runtime_requirement()
