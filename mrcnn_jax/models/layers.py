"""Building blocks: layers with bias, convolutions with batch norm, max pooling, padding masks.

Shapes are NHWC. `dtype` is the compute dtype; parameters, batch statistics and normalisation are
float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from mrcnn_jax.config.heads import Norm
from mrcnn_jax.models.convolution import stride1_conv2d, xla_conv2d
from mrcnn_jax.ops.platforms import by_platform

_MOMENTUM = 0.9  # of batch norm: the share of the running statistics that survives a batch
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


@jax.custom_vjp
def relu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns max(x, 0); its derivative reads the output, which the next layer keeps anyway.

    So the input has a single user, as GPU compilers need to fuse convolution, bias and ReLU. The
    derivative of `jax.nn.relu` is a second user. NaN passes, forward and backward.
    """
    return jnp.maximum(x, 0)


def _relu_forward(x: Array) -> tuple[Array, Array]:
    y = relu(x)
    return y, y


def _relu_backward(y: Array, cotangent: Array) -> tuple[Array]:
    # Not y > 0, which XLA turns into x > 0: a second user again.
    return (jnp.where(y != 0, cotangent, jnp.zeros_like(cotangent)),)


relu.defvjp(_relu_forward, _relu_backward)


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


def conv2d(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], strides: int
) -> Float[Array, "b h2 w2 o"]:
    """Convolves with (k - 1) // 2 cells of padding on either side, as torch does.

    'SAME' would pad unevenly at stride 2.
    """
    side = (kernel.shape[0] - 1) // 2
    plain = functools.partial(xla_conv2d, strides=strides, padding=(side, side))

    def as_matmul(x: Array, kernel: Array) -> Array:
        return jnp.dot(x[:, ::strides, ::strides], kernel[0, 0])

    if kernel.shape[0] == 1:
        # On a CPU, a product of matrices is faster forward and backward; on a GPU, only a
        # convolution takes bias, sum and ReLU into its kernel.
        return by_platform(x, kernel, cpu=as_matmul, default=plain)
    if strides == 1:
        return stride1_conv2d(x, kernel, (side, side))
    return plain(x, kernel)


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


class Conv3x3(nn.Module):
    """3x3 convolution with padding 1. It differs from `nn.Conv` in `add_bias`.

    Parameters: `kernel` (HWIO) and `bias`. A batch norm that follows may be given as `fold`.
    """

    features: int
    kernel_init: Any
    use_bias: bool = True
    strides: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], fold: ChannelNorm | None = None
    ) -> Float[Array, "b h2 w2 o"]:
        kernel = self.param(
            "kernel", self.kernel_init, (3, 3, x.shape[-1], self.features), jnp.float32
        )
        if fold is not None:
            kernel = kernel * _as_map(fold.factor)
        y = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.strides)
        if fold is not None:
            return add_bias(y, fold.offset)
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
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        return add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32))


class Pointwise(nn.Module):
    """1x1 convolution of a map, with the parameters of `Dense`."""

    features: int
    kernel_init: Any
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = conv2d(x.astype(self.dtype), kernel.astype(self.dtype)[None, None], 1)
        return add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32))


def batch_moments(
    maps: Sequence[Float[Array, "b _h _w c"]], masks: Sequence[Bool[Array, "b _h _w 1"]] | None
) -> tuple[Float[Array, " c"], Float[Array, " c"], Float[Array, ""]]:
    """Returns mean, biased variance and number of the cells of all maps, in float32.

    Only cells where a mask is True count; None: all. If there are none, all three are 0.
    """
    if masks is None:
        masks = [jnp.ones((*x.shape[:3], 1), bool) for x in maps]

    def over_cells(values: Sequence[Array]) -> Array:
        pairs = zip(values, masks, strict=True)
        sums = [jnp.sum(jnp.where(mask, x, 0), axis=(0, 1, 2)) for x, mask in pairs]
        return reduce(jnp.add, sums) / jnp.maximum(count, 1.0)

    maps = [x.astype(jnp.float32) for x in maps]
    count = reduce(jnp.add, [jnp.sum(mask, dtype=jnp.float32) for mask in masks])
    mean = over_cells(maps)
    # From the deviations: E[x^2] - E[x]^2 would cancel where the mean is large.
    return mean, over_cells([jnp.square(x - _as_map(mean)) for x in maps]), count


class ChannelNorm(NamedTuple):
    """What a batch norm does to each channel: (x - mean) * factor + bias, in float32."""

    mean: Float[Array, " c"]
    factor: Float[Array, " c"]
    bias: Float[Array, " c"]

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return (x.astype(jnp.float32) - _as_map(self.mean)) * _as_map(self.factor) + _as_map(
            self.bias
        )

    @property
    def offset(self) -> Float[Array, " c"]:
        """What is left to add where `factor` is in the kernel of a convolution already."""
        return self.bias - self.mean * self.factor


def batch_norm(
    module: nn.Module,
    features: int,
    maps: Sequence[Float[Array, "b _h _w c"]] | None,
    masks: Sequence[Bool[Array, "b _h _w 1"]] | None,
    *,
    epsilon: float = 1e-5,
) -> ChannelNorm:
    """Makes the parameters of a batch norm in `module`; call it inside its `nn.compact`.

    'params' has `scale` and `bias`, 'batch_stats' the running `mean` and `var`.

    Args:
        module: gets the parameters.
        features: channels.
        maps: normalise by the statistics of these maps together. The running ones then move
            ('batch_stats' has to be mutable), unless the masks leave no cell. None: by the running
            ones.
        masks: cells of the maps that count; None: all.
        epsilon: added to the variance.
    """
    size = (features,)
    scale = module.param("scale", nn.initializers.ones, size, jnp.float32)
    bias = module.param("bias", nn.initializers.zeros, size, jnp.float32)
    running_mean = module.variable("batch_stats", "mean", jnp.zeros, size, jnp.float32)
    running_var = module.variable("batch_stats", "var", jnp.ones, size, jnp.float32)
    mean, var = running_mean.value, running_var.value
    if maps is not None:
        mean, var, count = batch_moments(maps, masks)
        if not module.is_initializing():
            for running, new in ((running_mean, mean), (running_var, var)):
                moved = _MOMENTUM * running.value + (1.0 - _MOMENTUM) * lax.stop_gradient(new)
                running.value = jnp.where(count > 0, moved, running.value)
    return ChannelNorm(mean, scale * lax.rsqrt(var + epsilon), bias)


class BatchNorm(nn.Module):
    """`batch_norm` as a module of its own, for maps that share one."""

    features: int

    @nn.compact
    def __call__(
        self,
        maps: Sequence[Float[Array, "b _h _w c"]] | None = None,
        masks: Sequence[Bool[Array, "b _h _w 1"]] | None = None,
    ) -> ChannelNorm:
        return batch_norm(self, self.features, maps, masks)


class ConvNorm(nn.Module):
    """Square convolution without bias, batch norm, and ReLU unless `relu` is False.

    'params' has `kernel` (HWIO), `scale` and `bias`; 'batch_stats' the running `mean` and `var`.
    """

    features: int
    kernel_size: int
    strides: int = 1
    relu: bool = True
    epsilon: float = 1e-5
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
        norm = functools.partial(batch_norm, self, self.features, epsilon=self.epsilon)
        x = x.astype(self.dtype)
        if live:
            y = conv2d(x, kernel.astype(self.dtype), self.strides)
            y = norm([y], None if mask is None else [mask])(y).astype(self.dtype)
        else:
            running = norm(None, None)
            folded = (kernel * _as_map(running.factor)).astype(self.dtype)
            y = add_bias(conv2d(x, folded, self.strides), running.offset)
        return relu(y) if self.relu else y


def conv_norm_relu(
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
    y = Conv3x3(channels, kernel_init, use_bias=norm == "none", dtype=dtype, name=name)(x)
    if norm == "group":
        fitting = (g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 8)
        groups = next(fitting, 1)
        # Flax's fast variance, E[x^2] - E[x]^2, would cancel where the mean is large.
        group_norm = nn.GroupNorm(
            groups, epsilon=1e-5, use_fast_variance=False, name=f"{name}_norm"
        )
        over = None if mask is None else jnp.broadcast_to(mask, y.shape)
        y = group_norm(y.astype(jnp.float32), mask=over).astype(dtype)
    return relu(y)


def _as_map(channels: Float[Array, " c"]) -> Float[Array, "1 1 1 c"]:
    return channels[None, None, None]
