"""3x3 convolutions with 4 multiplications in place of 9 (Lavin & Gray 2016, F(2x2, 3x3)).

Each 2x2 cells of the output come from 4x4 cells of the input: both are transformed by sums alone,
and in between are 16 products of matrices. On a CPU, whose convolutions run near the rate of its
products, only fewer multiplications are faster. The transformed cells must stay in the caches, so a
map is computed in strips of rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

# Cells that are computed together: 16 transforms of them with 256 channels are a few megabytes.
_CELLS = 4096


@jax.custom_vjp
def convolve_3x3(
    x: Float32[Array, "b h w i"], kernel: Float32[Array, "3 3 i o"]
) -> Float32[Array, "b h w o"]:
    """Convolves with stride 1 and one cell of zero padding, to about 1e-6 of the largest value.

    The gradient of `x` is computed in the same way, that of the kernel as of any convolution.
    """
    return _in_strips(x, _transformed(kernel))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolve_3x3(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    (of_kernel,) = jax.vjp(lambda k: _plain(x, k), kernel)[1](cotangent)
    return _in_strips(cotangent, _transformed(turned)), of_kernel


convolve_3x3.defvjp(_forward, _backward)


def _plain(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _in_strips(x: Float32[Array, "b h w i"], factors: list[list[Array]]) -> Array:
    """Strips of an even number of rows; a map of odd sides gets a row and a column more."""
    b, h, w, _ = x.shape
    height, width = h + h % 2, w + w % 2
    rows = max(_CELLS // (b * width) // 2 * 2, 2)
    strips = -(-height // rows)
    rows = -(-height // (2 * strips)) * 2
    padded = jnp.pad(x, [(0, 0), (1, strips * rows + 1 - h), (1, width + 1 - w), (0, 0)])

    def strip(number: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(padded, number * rows, rows + 2, axis=1)
        return _tiles(part, factors)

    if strips == 1:
        found = _tiles(padded, factors)
    else:
        found = jax.lax.map(strip, jnp.arange(strips, dtype=jnp.int32))
        found = jnp.moveaxis(found, 0, 1).reshape(b, strips * rows, width, -1)
    return found[:, :h, :w]


def _transformed(kernel: Float32[Array, "3 3 i o"]) -> list[list[Array]]:
    """G g G^T: 4x4 matrices [i, o]."""

    def along(taps: list[Array]) -> list[Array]:
        first, second, third = taps
        ends = first + third
        return [first, (ends + second) / 2, (ends - second) / 2, third]

    columns = [along([kernel[y, x] for y in range(3)]) for x in range(3)]
    return [along([columns[x][y] for x in range(3)]) for y in range(4)]


def _tiles(x: Float32[Array, "b h+2 w+2 i"], factors: list[list[Array]]) -> Array:
    """The convolution of a padded map with even sides: A^T [(G g G^T) * (B^T d B)] A."""

    def spread(cells: list[Array]) -> list[Array]:
        a, b, c, d = cells
        return [a - c, b + c, c - b, b - d]

    def gathered(products: list[Array]) -> list[Array]:
        a, b, c, d = products
        return [a + b + c, b - c - d]

    b, height, width, _ = x.shape
    height, width = height - 2, width - 2
    d = [[x[:, y : y + height : 2, c : c + width : 2] for c in range(4)] for y in range(4)]
    columns = [spread([d[y][c] for y in range(4)]) for c in range(4)]
    cells = [spread([columns[c][y] for c in range(4)]) for y in range(4)]
    products = [[jnp.tensordot(cells[y][c], factors[y][c], 1) for c in range(4)] for y in range(4)]
    rows = [gathered([products[y][c] for y in range(4)]) for c in range(4)]
    found = [gathered([rows[c][y] for c in range(4)]) for y in range(2)]
    pairs = jnp.stack([jnp.stack(row, axis=3) for row in found], axis=2)
    return pairs.reshape(b, height, width, -1)
