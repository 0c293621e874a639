"""Random parameters, by the initialisers that the modules declare."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn


def initialise(model: nn.Module, *example: Any, seed: int) -> dict[str, Any]:
    """The variables ('params', 'batch_stats') of `model` for inputs shaped as `example`: the same
    seed, the same bits.

    Only the initialisers are compiled: nothing of what the model computes from `example` reaches a
    result. What is left is one small random number generator a parameter, run once, so the compiler
    is told not to spend long on them.
    """
    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 1})
    return init(jax.random.key(seed), *example)
