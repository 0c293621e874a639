"""Layers with a bias: flax's in float32, sums that keep their digits in bfloat16."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.models.layers import Conv3x3, Dense, batch_moments, conv_norm_relu

normal = nn.initializers.normal(0.1)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (Conv3x3(7, normal), nn.Conv(7, (3, 3), padding=1, kernel_init=normal), (2, 9, 13, 5)),
        (Dense(7, normal), nn.Dense(7, kernel_init=normal), (2, 9, 13, 5)),
        (Dense(6), nn.Dense(6), (31, 5)),
    ],
    ids=["convolution", "1x1 convolution", "fully connected"],
)
def test_float32_layers_are_those_of_flax_to_the_bit(
    ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...]
) -> None:
    """Initial values, outputs, and gradients of kernel, bias and input."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def everything(module: nn.Module) -> Any:
        variables = module.init(jax.random.key(3), x)
        outputs, pull = jax.vjp(lambda v, x: module.apply(v, x), variables, x)
        return variables, outputs, pull(jnp.sin(outputs))

    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(lambda: everything(ours))(),
        jax.jit(lambda: everything(theirs))(),
    )


@pytest.mark.parametrize(
    "layer", [Conv3x3(4, normal, dtype=jnp.bfloat16), Dense(4, normal, dtype=jnp.bfloat16)]
)
def test_the_bias_of_a_large_map_gets_its_gradient_in_float32(layer: nn.Module) -> None:
    """A sum over 57,600 cells, which a sum in bfloat16 misses by several per cent."""
    random = np.random.default_rng(0)
    cotangent = random.normal(0.3, 1.0, (2, 120, 240, 4)).astype(jnp.bfloat16)
    x = random.normal(size=(2, 120, 240, 2)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x)
    (gradient,) = jax.jit(lambda v, c: jax.vjp(lambda v: layer.apply(v, x), v)[1](c))(
        variables, cotangent
    )
    bias = gradient["params"]["bias"]
    assert bias.dtype == jnp.float32
    np.testing.assert_allclose(bias, cotangent.astype(np.float64).sum((0, 1, 2)), rtol=1e-5)


class _GroupNormed(nn.Module):
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return conv_norm_relu(
            x, self.channels, "group", kernel_init=normal, dtype=self.dtype, name="conv1"
        )


@pytest.mark.parametrize(
    ("channels", "groups", "dtype"),
    [
        (256, 32, "float32"),
        (20, 2, "float32"),
        (32, 4, "bfloat16"),
        (512, 32, "float32"),
        (384, 32, "float32"),
        (200, 8, "float32"),  # of 25: 16 groups would not be even, and 32 have too few
        (9, 1, "float32"),
    ],
)
def test_group_norm_equals_numpy(channels: int, groups: int, dtype: str) -> None:
    """Each box is normalised by its own groups, in float32 of what a bfloat16 convolution gave."""
    rng = np.random.default_rng(0)
    # The centre tap alone hands a large mean on, which a variance as a difference of squares, or
    # one in bfloat16, would not survive.
    kernel = np.zeros((3, 3, 1, channels), np.float32)
    scale, bias = rng.normal(size=(2, channels)).astype(np.float32)
    layer = _GroupNormed(channels, dtype=jnp.dtype(dtype))
    params = {"conv1": {"kernel": kernel}, "conv1_norm": {"scale": scale, "bias": bias}}
    example = np.zeros((2, 5, 5, 1), np.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), example)["params"]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )

    apply = jax.jit(layer.apply)
    # Channels of a group with means of their own, which tell groups apart, and with the same one,
    # beside which the variance is small.
    for factors, mean in ((channels, 400), (groups, 1600 if dtype == "float32" else 400)):
        x = np.asarray(jnp.asarray(rng.normal(mean, 3, example.shape), dtype), np.float32)
        # Powers of two: exact in bfloat16.
        kernel[1, 1] = rng.choice([0.5, 1, 2], factors).repeat(channels // factors)
        found = apply({"params": params}, x)
        assert found.dtype == jnp.dtype(dtype)
        y = (x.astype(np.float64) * kernel[1, 1]).reshape(2, 5, 5, groups, -1)
        y = (y - y.mean((1, 2, 4), keepdims=True)) / np.sqrt(y.var((1, 2, 4), keepdims=True) + 1e-5)
        expected = np.maximum(y.reshape(2, 5, 5, channels) * scale + bias, 0)
        bound = 5e-3 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(found.astype(np.float32), expected, rtol=bound, atol=bound)


def test_moments_of_a_large_mean_are_those_of_float64() -> None:
    """Of all cells that count, on two maps; a difference of squares would cancel."""
    rng = np.random.default_rng(0)
    maps = [rng.normal(4000, 3, (2, side, side, 3)).astype(np.float32) for side in (8, 4)]
    masks = [rng.random((*one.shape[:3], 1)) < 0.6 for one in maps]
    cells = [one[mask[..., 0]] for one, mask in zip(maps, masks, strict=True)]
    cells = np.concatenate(cells).astype(np.float64)
    mean, variance, count = jax.jit(batch_moments)(maps, masks)
    assert count == len(cells)
    np.testing.assert_allclose(mean, cells.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, cells.var(0), rtol=1e-4)
