"""Building blocks: layers with bias, convolutions with batch norm, max pooling, padding masks.

Shapes are NHWC. `dtype` is the compute dtype; parameters, batch statistics and normalisation are
float32.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from mrcnn_jax.config.model import Norm

# He et al. 2015 for ReLU, by fan-out as is usual for ResNets (also in torchvision).
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def cell_mask(
    image_sizes: Int32[Array, "b 2"], valid: Bool[Array, " b"], stride: int, grid: tuple[int, int]
) -> Bool[Array, "b h w 1"]:
    """Marks the cells of a feature map that lie on an image; the rest is the canvas's padding.

    Row i does if i * stride < height, and columns alike.

    Args:
        image_sizes: (height, width) in pixels.
        valid: images that exist; the others have no cell.
        stride: pixels between cells.
        grid: (h, w) cells of the map.
    """
    rows = jnp.arange(grid[0], dtype=jnp.int32)[None, :] * stride < image_sizes[:, :1]
    columns = jnp.arange(grid[1], dtype=jnp.int32)[None, :] * stride < image_sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :] & valid[:, None, None])[..., None]


@jax.custom_jvp
def relu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns max(x, 0); its derivative reads the output.

    So the input has a single user, as GPU compilers need to fuse convolution, bias and ReLU. The
    derivative of `jax.nn.relu` is a second user.
    """
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = relu(*primals)
    (tangent,) = tangents
    return y, jnp.where(y > 0, tangent, jnp.zeros_like(tangent))


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Max pooling, 3x3 with stride 2 and padding 1: h2 = ceil(h / 2).

    Computed as maxima of strided slices, first of rows, then of columns: on a CPU the gradient of
    `nn.max_pool` (select-and-scatter) is several times slower. Cells that tie share the gradient.
    """
    for axis in (1, 2):
        out = (x.shape[axis] + 1) // 2
        # 2 * out + 1 cells are read: one of padding before, and one after if the size is odd.
        padding = [(0, 0, 0)] * 4
        padding[axis] = (1, 2 * out - x.shape[axis], 0)
        padded = lax.pad(x, jnp.array(-jnp.inf, x.dtype), padding)
        x = reduce(
            jnp.maximum,
            [lax.slice_in_dim(padded, i, i + 2 * out - 1, stride=2, axis=axis) for i in range(3)],
        )
    return x


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], strides: int
) -> Float[Array, "b h2 w2 o"]:
    """Convolves with (k - 1) // 2 cells of padding on either side, as torch does.

    'SAME' would pad unevenly at stride 2.
    """
    size = kernel.shape[0]
    if size == 1:  # a matrix product: on a CPU, faster forward and backward than a convolution
        return lax.dot_general(x[:, ::strides, ::strides], kernel[0, 0], (((3,), (0,)), ((), ())))
    return lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        [((size - 1) // 2,) * 2] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@jax.custom_vjp
def add_bias(x: Float[Array, "*n c"], bias: Float[Array, " c"]) -> Float[Array, "*n c"]:
    """Adds a float32 bias in the dtype of `x`: GPU compilers then fuse convolution, bias and ReLU.

    The gradient of the bias is summed in float32: over the cells of a large map, a sum in bfloat16
    is off by a tenth.
    """
    return x + bias.astype(x.dtype).reshape(*(1,) * (x.ndim - 1), -1)


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, None]:
    return add_bias(x, bias), None


def _add_bias_backward(_: None, cotangent: Array) -> tuple[Array, Array]:
    return cotangent, jnp.sum(cotangent, axis=range(cotangent.ndim - 1), dtype=jnp.float32)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class Conv(nn.Module):
    """3x3 convolution with padding 1. It differs from `nn.Conv` in `add_bias`.

    Parameters: `kernel` (HWIO) and `bias`.
    """

    features: int
    kernel_init: Any
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        kernel = self.param(
            "kernel", self.kernel_init, (3, 3, x.shape[-1], self.features), jnp.float32
        )
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), 1)
        if not self.use_bias:
            return y
        return add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32))


class Dense(nn.Module):
    """Fully connected layer. It differs from `nn.Dense` in `add_bias`.

    Parameters: `kernel` (IO) and `bias`.
    """

    features: int
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = lax.dot_general(
            x.astype(self.dtype), kernel.astype(self.dtype), (((x.ndim - 1,), (0,)), ((), ()))
        )
        return add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32))


def batch_moments(
    x: Float[Array, "b h w c"], mask: Bool[Array, "b h w 1"] | None
) -> tuple[Float[Array, " c"], Float[Array, " c"], Float[Array, ""]]:
    """Returns mean, biased variance and number of the cells where `mask` is True, in float32.

    None means all cells. If there are none, all three are 0.
    """
    if mask is None:
        mask = jnp.ones((*x.shape[:3], 1), bool)
    x = jnp.where(mask, x.astype(jnp.float32), 0.0)
    count = jnp.sum(mask, dtype=jnp.float32)
    mean = jnp.sum(x, axis=(0, 1, 2)) / jnp.maximum(count, 1.0)
    # From the deviations: E[x^2] - E[x]^2 would cancel where the mean is large.
    variance = jnp.sum(
        jnp.where(mask, jnp.square(x - _wide(mean)), 0.0), axis=(0, 1, 2)
    ) / jnp.maximum(count, 1.0)
    return mean, variance, count


class ConvNorm(nn.Module):
    """Square convolution without bias, batch norm, and ReLU unless `relu` is False.

    'params' has `kernel` (HWIO), `scale` and `bias`; 'batch_stats' the running `mean` and `var`.
    """

    features: int
    kernel_size: int
    strides: int = 1
    relu: bool = True
    epsilon: float = 1e-5
    momentum: float = 0.9  # share of the running statistics that survives a live batch
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w i"],
        *,
        live: bool,
        mask: Bool[Array, "b h2 w2 1"] | None = None,
    ) -> Float[Array, "b h2 w2 o"]:
        """Applies the layer.

        Args:
            x: features.
            live: False: normalise by the running statistics, folded into the kernel and a bias.
                True: by those of the batch; the running ones then move ('batch_stats' has to be
                mutable), unless the mask leaves no cell.
            mask: cells of the output that batch statistics are taken over; None: all. The others
                are normalised in the same way, as they are by the running statistics.

        Returns:
            Features, h2 = ceil(h / strides), in the compute dtype.
        """
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", he_normal_fan_out, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (self.features,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        running_mean = self.variable(
            "batch_stats", "mean", jnp.zeros, (self.features,), jnp.float32
        )
        running_var = self.variable("batch_stats", "var", jnp.ones, (self.features,), jnp.float32)
        x = x.astype(self.dtype)

        if live:
            y = convolve(x, kernel.astype(self.dtype), self.strides).astype(jnp.float32)
            mean, var, count = batch_moments(y, mask)
            if not self.is_initializing():
                for running, new in ((running_mean, mean), (running_var, var)):
                    moved = self.momentum * running.value + (
                        1.0 - self.momentum
                    ) * lax.stop_gradient(new)
                    running.value = jnp.where(count > 0, moved, running.value)
            factor = scale * lax.rsqrt(var + self.epsilon)
            y = ((y - _wide(mean)) * _wide(factor) + _wide(bias)).astype(self.dtype)
        else:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            folded = (kernel * _wide(factor)).astype(self.dtype)
            y = add_bias(convolve(x, folded, self.strides), bias - running_mean.value * factor)
        return relu(y) if self.relu else y


def conv_relu(
    x: Float[Array, "b h w i"],
    channels: int,
    norm: Norm,
    *,
    kernel_init: Any,
    dtype: Dtype,
    name: str,
    mask: Bool[Array, "b h w 1"] | None = None,
) -> Float[Array, "b h w o"]:
    """Applies a head's 3x3 convolution and ReLU; call it inside a module's `nn.compact`.

    A normalisation replaces the bias.

    Args:
        x: features.
        channels: of the output.
        norm: normalisation between convolution and ReLU.
        kernel_init: initialiser of the kernel.
        dtype: compute dtype.
        name: of the convolution; that of the group norm ends in "_norm".
        mask: cells that the statistics of group norm are taken over, at least one of each row;
            None: all. The features of boxes have no padding; those of invalid boxes are 0, and stay
            finite.
    """
    if norm == "frozen_batch":
        return ConvNorm(channels, 3, dtype=dtype, name=name)(x, live=False)
    y = Conv(channels, kernel_init, use_bias=norm == "none", dtype=dtype, name=name)(x)
    if norm == "group":
        groups = math.gcd(32, max(channels // 8, 1), channels)
        # Flax's fast variance, E[x^2] - E[x]^2, would cancel where the mean is large.
        group_norm = nn.GroupNorm(
            groups, epsilon=1e-5, use_fast_variance=False, name=f"{name}_norm"
        )
        over = None if mask is None else jnp.broadcast_to(mask, y.shape)
        y = group_norm(y.astype(jnp.float32), mask=over).astype(dtype)
    return relu(y)


def _wide(channels: Float[Array, " c"]) -> Float[Array, "1 1 1 c"]:
    return channels[None, None, None]
