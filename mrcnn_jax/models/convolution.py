"""Convolutions of stride 1, on a CPU as it computes them fastest, with their gradients.

Wide ones of 3x3 taps are Winograd convolutions, 4 multiplications in place of 9 (Lavin & Gray 2016,
F(2x2, 3x3)): each 2x2 cells of the output come from 4x4 cells of the input; both are transformed by
sums alone, and in between are 16 products of matrices. A CPU's convolutions run near the rate of
its products, so only fewer multiplications are faster. The transformed cells must stay in the
caches, so a map is computed in strips of rows.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from mrcnn_jax.ops.platforms import by_platform
from mrcnn_jax.ops.rows import fresh_zeros

# Cells that are computed together: 1024 to 8192 were tried (benchmarks/LOG.md).
_STRIP_CELLS = 4096
# With fewer channels, the sums cost more than the products that they save; on fewer cells, they are
# not worth compiling.
_LEAST_CHANNELS = 256
_LEAST_CELLS = 3000


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def stride1_conv2d(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], padding: tuple[int, int]
) -> Float[Array, "b h2 w2 o"]:
    """Convolves with stride 1; on a CPU, large maps by wide kernels to 1e-6 of the largest value.

    Args:
        x: features.
        kernel: taps.
        padding: cells of zeros before and after the map, along both axes.
    """
    return by_platform(
        x,
        kernel,
        cpu=lambda x, kernel: _on_cpu(x, kernel, padding),
        default=lambda x, kernel: xla_conv2d(x, kernel, padding=padding),
    )


def xla_conv2d(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "k k i o"],
    *,
    strides: int = 1,
    padding: tuple[int, int],
) -> Float[Array, "b h2 w2 o"]:
    """XLA's own convolution."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        [padding, padding],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _stride1_conv2d_forward(
    x: Array, kernel: Array, padding: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    # Nothing else is kept: a choice by platform around all of this would keep copies of both.
    return stride1_conv2d(x, kernel, padding), (x, kernel)


def _stride1_conv2d_backward(
    padding: tuple[int, int], residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    def plain(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
        apply = functools.partial(xla_conv2d, padding=padding)
        return jax.vjp(apply, x, kernel)[1](cotangent)

    def on_cpu(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
        flipped = kernel[::-1, ::-1].swapaxes(2, 3)
        before, after = (len(kernel) - 1 - cells for cells in padding)
        x_gradient = _on_cpu(cotangent, flipped, (before, after))
        # Channels as images, and images as channels: inside a loop or a branch, XLA takes thirty
        # times as long for its own form of the same.
        kernel_gradient = xla_conv2d(
            x.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), padding=padding
        ).transpose(1, 2, 0, 3)
        return x_gradient, kernel_gradient

    return by_platform(*residuals, cotangent, cpu=on_cpu, default=plain)


stride1_conv2d.defvjp(_stride1_conv2d_forward, _stride1_conv2d_backward)


def _on_cpu(x: Array, kernel: Array, padding: tuple[int, int]) -> Array:
    pays = min(kernel.shape[2:]) >= _LEAST_CHANNELS and math.prod(x.shape[:3]) >= _LEAST_CELLS
    if pays and x.dtype == jnp.float32 and kernel.shape[0] == 3 and padding == (1, 1):
        return _winograd_in_strips(x, _transform_kernel(kernel))
    return xla_conv2d(x, kernel, padding=padding)


def _winograd_in_strips(x: Float32[Array, "b h w i"], factors: list[list[Array]]) -> Array:
    """Computes strips of an even number of rows; odd sides get a row and a column more."""
    b, h, w, _ = x.shape
    height, width = h + h % 2, w + w % 2
    rows = max(_STRIP_CELLS // (b * width) // 2 * 2, 2)
    strips = -(-height // rows)
    rows = -(-height // (2 * strips)) * 2
    padded = jnp.pad(x, [(0, 0), (1, strips * rows + 1 - h), (1, width + 1 - w), (0, 0)])

    if strips == 1:
        return _winograd(padded, factors)[:, :h, :w]

    def write_strip(number: Array, total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(padded, number * rows, rows + 2, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(
            total, _winograd(part, factors), number * rows, axis=1
        )

    channels = factors[0][0].shape[1]
    total = jax.ShapeDtypeStruct((b, strips * rows, width, channels), x.dtype)
    total = jax.lax.fori_loop(0, strips, write_strip, fresh_zeros(total, after=x))
    return total[:, :h, :w]


def _transform_kernel(kernel: Float32[Array, "3 3 i o"]) -> list[list[Array]]:
    """G g G^T: 4x4 matrices [i, o]."""

    def g(taps: list[Array]) -> list[Array]:
        first, second, third = taps
        ends = first + third
        return [first, (ends + second) / 2, (ends - second) / 2, third]

    columns = [g([kernel[y, x] for y in range(3)]) for x in range(3)]
    return [g([columns[x][y] for x in range(3)]) for y in range(4)]


def _winograd(x: Float32[Array, "b h+2 w+2 i"], factors: list[list[Array]]) -> Array:
    """The convolution of a padded map with even sides: A^T [(G g G^T) * (B^T d B)] A."""

    def transform_input(cells: list[Array]) -> list[Array]:
        a, b, c, d = cells
        return [a - c, b + c, c - b, b - d]

    def transform_output(products: list[Array]) -> list[Array]:
        a, b, c, d = products
        return [a + b + c, b - c - d]

    b, height, width, _ = x.shape
    height, width = height - 2, width - 2
    d = [[x[:, y : y + height : 2, c : c + width : 2] for c in range(4)] for y in range(4)]
    columns = [transform_input([d[y][c] for y in range(4)]) for c in range(4)]
    cells = [transform_input([columns[c][y] for c in range(4)]) for y in range(4)]
    products = [[jnp.tensordot(cells[y][c], factors[y][c], 1) for c in range(4)] for y in range(4)]
    columns = [transform_output([products[y][c] for y in range(4)]) for c in range(4)]
    outputs = [transform_output([columns[c][y] for c in range(4)]) for y in range(2)]
    pairs = jnp.stack([jnp.stack(row, axis=3) for row in outputs], axis=2)
    return pairs.reshape(b, height, width, -1)


@jax.custom_vjp
def depthwise_conv2d(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]
) -> Float[Array, "b h w c"]:
    """Convolves each channel by a kernel of its own, of odd sides; zeros pad to the same size."""
    # Of both forms on a CPU, a short trial favoured the sum; a proper one is still to be made.
    return by_platform(x, kernel, cpu=_sum_of_taps, default=_grouped)


def _grouped(x: Array, kernel: Array) -> Array:
    """XLA's own form of `depthwise_conv2d`."""
    side = len(kernel) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        [(side, side)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _sum_of_taps(x: Array, kernel: Array) -> Array:
    """`depthwise_conv2d` as products of shifted maps, summed in float32."""
    size, (_, height, width, _) = len(kernel), x.shape
    padded, wide = _padded(x, size), kernel.astype(jnp.float32)
    total = jnp.zeros(x.shape, jnp.float32)
    for row, column in itertools.product(range(size), repeat=2):
        shifted = padded[:, row : row + height, column : column + width]
        total += shifted.astype(jnp.float32) * wide[row, column, 0][None, None, None]
    return total.astype(x.dtype)


def _padded(x: Array, size: int) -> Array:
    side = size // 2
    return jnp.pad(x, [(0, 0), (side, side), (side, side), (0, 0)])


def _depthwise_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_conv2d(x, kernel), (x, kernel)


def _depthwise_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    def plain(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
        return jax.vjp(_grouped, x, kernel)[1](cotangent)

    def on_cpu(x: Array, kernel: Array, cotangent: Array) -> tuple[Array, Array]:
        size, wide = len(kernel), cotangent.astype(jnp.float32)
        padded, (_, height, width, _) = _padded(x, size), x.shape

        # A row of taps at a time: all at once take longer to compile.
        def row_gradient(row: Array) -> Array:
            shifted = jax.lax.dynamic_slice_in_dim(padded, row, height, axis=1).astype(jnp.float32)
            parts = (shifted[:, :, column : column + width] for column in range(size))
            return jnp.stack([jnp.sum(part * wide, axis=(0, 1, 2)) for part in parts])

        kernel_gradient = jax.lax.map(row_gradient, jnp.arange(size, dtype=jnp.int32))
        x_gradient = _sum_of_taps(cotangent, kernel[::-1, ::-1])
        return x_gradient, kernel_gradient[:, :, None].astype(kernel.dtype)

    return by_platform(*residuals, cotangent, cpu=on_cpu, default=plain)


depthwise_conv2d.defvjp(_depthwise_forward, _depthwise_backward)
