"""The device and its compiler."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jaxlib


@functools.cache
def _compiler_options() -> dict[str, Any] | None:
    """On a CPU, YNNPACK's fusions cost up to half of the speed; a build that does not know the option compiles without it."""
    if jax.default_backend() != "cpu":
        return None
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(0).compile()
    except Exception:  # the type of this error differs between jaxlib versions
        return None
    return options


def compile_options(**options: Any) -> dict[str, Any]:
    """Arguments of `jax.jit` for a top-level program of this project."""
    return options | {"compiler_options": _compiler_options()}


def warn_of_slow_versions() -> None:
    """jaxlib 0.10.2 to 0.11.0 compile the RoIAlign backward to compare-and-swap loops on a GPU."""
    version = tuple(int(part) for part in jaxlib.__version__.split(".")[:3])
    if jax.default_backend() == "gpu" and (0, 10, 2) <= version < (0, 11, 1):
        warnings.warn(f"jaxlib {jaxlib.__version__} is slow on GPUs: use Python >= 3.12 and jax >= 0.11.1", stacklevel=2)
