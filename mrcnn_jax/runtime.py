"""The device and its compiler."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

import jax
import jaxlib

from mrcnn_jax.config.errors import ConfigError

# What a GPU starts by itself. XLA's default leaves out loops and branches, for whose conditions the
# host would wait at every turn, as NMS has them.
COMMAND_BUFFERS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"


@functools.cache
def compiler_options(backend: str, *, deterministic: bool = False) -> dict[str, Any] | None:
    """Returns XLA's options for this project's programs; None: the defaults.

    Args:
        backend: "cpu" or "gpu".
        deterministic: ask for programs that give the same bits each time. On a CPU they do so
            anyway, which is printed.

    Raises:
        ConfigError: `deterministic`, but this jaxlib does not have that option.
    """
    options: dict[str, Any]
    if backend == "gpu":
        options = {"xla_gpu_enable_command_buffer": COMMAND_BUFFERS}
        options = options if _known(options) else {}
        if deterministic:
            options["xla_gpu_deterministic_ops"] = True
            if not _known(options):
                raise ConfigError(
                    f"deterministic: jaxlib {jaxlib.__version__} has no option"
                    " xla_gpu_deterministic_ops"
                )
        return options or None
    if deterministic:
        print(f"deterministic: no option needed, {backend.upper()} runs are bit-equal anyway")
    # On a CPU, YNNPACK's fusions cost up to half of the speed; and XLA removes barriers before it
    # merges common subexpressions, which would undo `model.remat`. A build that does not know both
    # options compiles without them.
    options = {
        "xla_cpu_experimental_ynn_fusion_type": "",
        "xla_disable_hlo_passes": "cse_barrier_expander",
    }
    return options if backend == "cpu" and _known(options) else None


def _known(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(0).compile()
    except Exception:  # the type of this error differs between jaxlib versions
        return False
    return True


def compile_options(*, deterministic: bool = False, **options: Any) -> dict[str, Any]:
    """Returns arguments of `jax.jit` for a top-level program: `options` and `compiler_options`."""
    return options | {
        "compiler_options": compiler_options(jax.default_backend(), deterministic=deterministic)
    }


def warn_of_slow_versions() -> None:
    """Warns of jaxlib 0.10.2 to 0.11.0, whose RoIAlign gradient is slow on a GPU.

    They compile its scatter to loops of compare-and-swap.
    """
    version = tuple(map(int, re.findall(r"\d+", jaxlib.__version__)[:3]))
    if jax.default_backend() == "gpu" and (0, 10, 2) <= version < (0, 11, 1):
        warnings.warn(
            f"jaxlib {jaxlib.__version__} is slow on GPUs: use Python >= 3.12 and jax >= 0.11.1",
            stacklevel=2,
        )
