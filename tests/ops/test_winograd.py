"""3x3 convolutions with fewer multiplications, against XLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.ops import winograd


def arrays(size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A map, a kernel with more outputs than inputs, and a cotangent."""
    rng = np.random.default_rng(0)
    shapes = (*size, 5), (3, 3, 5, 7), (*size, 7)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("cells", [4, 30, 4096])  # strips of two rows, of a few, one strip
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 7, 9), (1, 12, 6), (3, 5, 4)])
def test_equals_a_convolution(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], cells: int
) -> None:
    """Also at the borders, with odd sides, and the gradients of both arguments."""
    monkeypatch.setattr(winograd, "_CELLS", cells)
    x, kernel, cotangent = arrays(size)

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            dimensions = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=dimensions
            )

    (y, of_y), (z, of_z) = (jax.vjp(f, x, kernel) for f in (winograd.convolve_3x3, plain))
    np.testing.assert_allclose(y, z, atol=3e-5)
    for a, b in zip(of_y(jnp.asarray(cotangent)), of_z(jnp.asarray(cotangent)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_whole_numbers_are_exact() -> None:
    """Kernels of multiples of 4 need no rounding: sums of products by hand."""
    rng = np.random.default_rng(1)
    x = rng.integers(-8, 9, (1, 6, 7, 3)).astype(np.float32)
    kernel = 4 * rng.integers(-8, 9, (3, 3, 3, 2)).astype(np.float32)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    expected = sum(
        padded[:, i : i + 6, j : j + 7] @ kernel[i, j] for i in range(3) for j in range(3)
    )
    np.testing.assert_array_equal(winograd.convolve_3x3(x, kernel), expected)
