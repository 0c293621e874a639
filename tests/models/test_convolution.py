"""Convolutions on a CPU, with fewer multiplications and with their own gradient, against XLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.models import convolution


def arrays(size: tuple[int, int, int], taps: int) -> tuple[np.ndarray, ...]:
    """A map, a kernel with more outputs than inputs, and a cotangent."""
    rng = np.random.default_rng(0)
    shapes = (*size, 5), (taps, taps, 5, 7), (*size, 7)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize("cells", [4, 30, 4096])  # strips of two rows, of a few, one strip
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 7, 9), (1, 12, 6), (3, 5, 4)])
def test_fewer_multiplications_equal_a_convolution(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], cells: int
) -> None:
    """Also at the borders, with odd sides, and the gradients of both arguments."""
    monkeypatch.setattr(convolution, "_STRIP_CELLS", cells)
    monkeypatch.setattr(convolution, "_LEAST_CHANNELS", 5)
    monkeypatch.setattr(convolution, "_LEAST_CELLS", 0)
    compare(size, 3, (1, 1))


@pytest.mark.parametrize(("taps", "padding"), [(1, (0, 0)), (2, (0, 1)), (3, (1, 1))])
def test_gradients_of_the_plain_form(taps: int, padding: tuple[int, int]) -> None:
    compare((2, 7, 9), taps, padding)


def compare(size: tuple[int, int, int], taps: int, padding: tuple[int, int]) -> None:
    x, kernel, cotangent = arrays(size, taps)

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return convolution.xla_conv2d(x, kernel, padding=padding)

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolution.stride1_conv2d(x, kernel, padding)

    (y, of_y), (z, of_z) = (jax.vjp(f, x, kernel) for f in (ours, plain))
    np.testing.assert_allclose(y, z, atol=3e-5)
    for a, b in zip(of_y(jnp.asarray(cotangent)), of_z(jnp.asarray(cotangent)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_whole_numbers_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of multiples of 4 need no rounding: sums of products by hand."""
    monkeypatch.setattr(convolution, "_LEAST_CHANNELS", 2)
    monkeypatch.setattr(convolution, "_LEAST_CELLS", 0)
    rng = np.random.default_rng(1)
    x = rng.integers(-8, 9, (1, 6, 7, 3)).astype(np.float32)
    kernel = 4 * rng.integers(-8, 9, (3, 3, 3, 2)).astype(np.float32)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    expected = sum(
        padded[:, i : i + 6, j : j + 7] @ kernel[i, j] for i in range(3) for j in range(3)
    )
    np.testing.assert_array_equal(convolution.stride1_conv2d(x, kernel, (1, 1)), expected)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 9, 4), (1, 20, 17)])
@pytest.mark.parametrize("taps", [3, 7])
def test_a_kernel_per_channel_equals_xlas_form(size: tuple[int, int, int], taps: int) -> None:
    """Maps smaller than the kernel too, and the gradients of both arguments."""
    rng = np.random.default_rng(2)
    x, cotangent = (rng.normal(size=(*size, 6)).astype(np.float32) for _ in range(2))
    kernel = rng.normal(size=(taps, taps, 1, 6)).astype(np.float32)
    (y, of_y), (z, of_z) = (
        jax.vjp(f, x, kernel)
        for f in (jax.jit(convolution.depthwise_conv2d), jax.jit(convolution._grouped))
    )
    np.testing.assert_allclose(y, z, atol=3e-5)
    for a, b in zip(of_y(jnp.asarray(cotangent)), of_z(jnp.asarray(cotangent)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    narrow = jax.jit(convolution.depthwise_conv2d)(
        *(jnp.asarray(a, jnp.bfloat16) for a in (x, kernel))
    )
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), z, atol=0.2)
