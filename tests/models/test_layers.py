"""Layers with a bias: flax's in float32, sums that keep their digits in bfloat16."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.models.layers import Conv, Dense

normal = nn.initializers.normal(0.1)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (Conv(7, normal), nn.Conv(7, (3, 3), padding=1, kernel_init=normal), (2, 9, 13, 5)),
        (Dense(7, normal), nn.Dense(7, kernel_init=normal), (2, 9, 13, 5)),
        (Dense(6), nn.Dense(6), (31, 5)),
    ],
    ids=["convolution", "1x1 convolution", "fully connected"],
)
def test_float32_layers_are_those_of_flax_to_the_bit(ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...]) -> None:
    """Initial values, outputs, and gradients of kernel, bias and input."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def everything(module: nn.Module) -> Any:
        variables = module.init(jax.random.key(3), x)
        outputs, pull = jax.vjp(lambda v, x: module.apply(v, x), variables, x)
        return variables, outputs, pull(jnp.sin(outputs))

    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda: everything(ours))(), jax.jit(lambda: everything(theirs))())


@pytest.mark.parametrize("layer", [Conv(4, normal, dtype=jnp.bfloat16), Dense(4, normal, dtype=jnp.bfloat16)])
def test_the_bias_of_a_large_map_gets_its_gradient_in_float32(layer: nn.Module) -> None:
    """A sum over 57,600 cells, which a sum in bfloat16 misses by several per cent."""
    random = np.random.default_rng(0)
    cotangent = random.normal(0.3, 1.0, (2, 120, 240, 4)).astype(jnp.bfloat16)
    x = random.normal(size=(2, 120, 240, 2)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x)
    (gradient,) = jax.jit(lambda v, c: jax.vjp(lambda v: layer.apply(v, x), v)[1](c))(variables, cotangent)
    bias = gradient["params"]["bias"]
    assert bias.dtype == jnp.float32
    np.testing.assert_allclose(bias, cotangent.astype(np.float64).sum((0, 1, 2)), rtol=1e-5)
