"""Last layers of the heads: logits, deltas, depths or IoUs, in float32 whatever comes before."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from mrcnn_jax.ops.classes import select_class


class OutputLayer(nn.Module):
    """Parameters of the last layer of a head: `kernel` (IO) and `bias`.

    A call returns them; `float32_outputs` and `float32_class_output` apply them.
    """

    features: int
    kernel_init: Any

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "i o"], Float[Array, " o"]]:
        return (
            self.param("kernel", self.kernel_init, (inputs, self.features), jnp.float32),
            self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32),
        )


def float32_outputs(x: Float[Array, "*n i"], *layers: OutputLayer) -> list[Float32[Array, "*n _o"]]:
    """Applies last layers in float32, whatever `x` is: what decides on boxes is not rounded.

    All of them are one product, which reads `x` once.

    Returns:
        The outputs of each layer.
    """
    kernels, biases = zip(*(layer(x.shape[-1]) for layer in layers), strict=True)
    values = float32_matmul(x, jnp.concatenate(kernels, axis=1)) + jnp.concatenate(biases).reshape(
        *(1,) * (x.ndim - 1), -1
    )
    return jnp.split(values, list(itertools.accumulate(len(b) for b in biases[:-1])), axis=-1)


def float32_class_output(
    x: Float[Array, "n h w p c"], layer: OutputLayer, labels: Int32[Array, " n"]
) -> Float32[Array, "n h w p"]:
    """Computes only one output of `float32_outputs(x, layer)`: that of each row's label (1..K)."""
    kernel, bias = layer(x.shape[-1])
    rows, classes = len(labels), len(bias)
    kernels = select_class(jnp.broadcast_to(kernel.T, (rows, classes, len(kernel))), labels, axis=1)
    biases = select_class(jnp.broadcast_to(bias, (rows, classes)), labels)
    logits = jnp.einsum("nhwpc,nc->nhwp", x.astype(jnp.float32), kernels, precision="highest")
    return logits + biases[:, None, None, None]


@jax.custom_vjp
def float32_matmul(
    x: Float[Array, "*n i"], kernel: Float32[Array, "i o"]
) -> Float32[Array, "*n o"]:
    """The product in float32: its factors are not rounded, as a GPU would to 10 bits.

    A bfloat16 `x` is multiplied by three bfloat16 parts of the kernel, 24 bits together, at the
    speed of such products: converted to float32, it would be written out and read again.
    """
    if x.dtype == jnp.float32:
        return jnp.dot(x, kernel, precision="highest")
    parts = _bfloat16_parts(kernel)
    return _sum_of_parts(jnp.dot(x, parts, preferred_element_type=jnp.float32))


def _float32_matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return float32_matmul(x, kernel), (x, kernel)


def _float32_matmul_backward(
    residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    rows = x.reshape(-1, x.shape[-1])
    cotangent = cotangent.reshape(-1, cotangent.shape[-1])
    x_gradient = jnp.dot(cotangent, kernel.T, precision="highest").astype(x.dtype).reshape(x.shape)
    if x.dtype == jnp.float32:
        return x_gradient, jnp.dot(rows.T, cotangent, precision="highest")
    parts = _bfloat16_parts(cotangent)
    return x_gradient, _sum_of_parts(jnp.dot(rows.T, parts, preferred_element_type=jnp.float32))


float32_matmul.defvjp(_float32_matmul_forward, _float32_matmul_backward)


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
