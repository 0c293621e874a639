"""Parameters of a network: random ones, by the initialisers of its modules, and their shapes."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import linen as nn

from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch


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


@functools.lru_cache(maxsize=16)
def variable_shapes(config: ModelConfig) -> Variables:
    """Shapes and dtypes of the variables of a network, without making them.

    Returns:
        'params' and 'batch_stats' of `jax.ShapeDtypeStruct`; every caller gets the same tree.
    """
    model = MaskRCNN(config)  # parameters do not depend on the size of images
    shapes: Variables = jax.eval_shape(
        lambda batch: model.init(jax.random.key(0), batch), example_batch((64, 64))
    )
    return shapes
