"""Random parameters, by the initialisers of the modules."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn


def initialise(model: nn.Module, *example: Any, seed: int) -> dict[str, Any]:
    """Draws the variables ('params', 'batch_stats') of `model`; the same seed gives the same bits.

    Only the initialisers are compiled, since no result depends on what the model computes from
    `example`. That leaves one small random number generator per parameter, run once, so the
    compiler is told not to spend long on it.

    Args:
        model: the module.
        example: inputs, of which only shapes and dtypes matter.
        seed: seed of the random numbers.
    """
    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 1})
    return init(jax.random.key(seed), *example)
