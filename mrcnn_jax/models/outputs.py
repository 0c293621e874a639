"""Last layers of the heads, to logits, deltas or depths, in float32 whatever comes before."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32

from mrcnn_jax.models.layers import matmul


class Outputs(nn.Module):
    """`kernel` (IO) and `bias` of the last layer of a head, to logits, deltas or depths."""

    features: int
    kernel_init: Any

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "i o"], Float[Array, " o"]]:
        return (
            self.param("kernel", self.kernel_init, (inputs, self.features), jnp.float32),
            self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32),
        )


def outputs(x: Float[Array, "*n i"], *layers: Outputs) -> list[Float32[Array, "*n _o"]]:
    """Applies last layers in float32, whatever `x` is: what decides on boxes is not rounded.

    All of them are one product, which reads `x` once.
    """
    kernels, biases = zip(*(layer(x.shape[-1]) for layer in layers), strict=True)
    values = exact_product(x, jnp.concatenate(kernels, axis=1)) + jnp.concatenate(biases).reshape(
        *(1,) * (x.ndim - 1), -1
    )
    return jnp.split(values, list(itertools.accumulate(len(b) for b in biases[:-1])), axis=-1)


@jax.custom_vjp
def exact_product(x: Float[Array, "*n i"], kernel: Float32[Array, "i o"]) -> Float32[Array, "*n o"]:
    """The product in float32: its factors are not rounded, as a GPU would to 10 bits.

    A bfloat16 `x` is multiplied by three bfloat16 parts of the kernel, 24 bits together, at the
    speed of such products: converted to float32, it would be written out and read again.
    """
    if x.dtype == jnp.float32:
        return _float32_product(x, kernel)
    products = matmul(x, _bfloat16_parts(kernel), preferred=jnp.float32)
    return _sum_of_parts(products)


def _exact_product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return exact_product(x, kernel), (x, kernel)


def _exact_product_backward(
    residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    rows, given = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    of_x = _float32_product(given, kernel.T).astype(x.dtype).reshape(x.shape)
    if x.dtype == jnp.float32:
        return of_x, _float32_product(rows.T, given)
    return of_x, _sum_of_parts(matmul(rows.T, _bfloat16_parts(given), preferred=jnp.float32))


exact_product.defvjp(_exact_product_forward, _exact_product_backward)


def _float32_product(x: Float32[Array, "*n i"], kernel: Float32[Array, "i o"]) -> Array:
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x, kernel, dimensions, precision=lax.Precision.HIGHEST)


def _bfloat16_parts(x: Float32[Array, "i o"]) -> BFloat16[Array, "i 3*o"]:
    """Three matrices side by side whose sum is `x`, but for the last bit."""
    parts = []
    for _ in range(3):
        # Not a conversion back and forth, which XLA leaves out.
        parts.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - parts[-1]
    return jnp.concatenate(parts, axis=1).astype(jnp.bfloat16)


def _sum_of_parts(x: Float32[Array, "*n 3*o"]) -> Float32[Array, "*n o"]:
    first, second, third = jnp.split(x, 3, axis=-1)
    return first + (second + third)
