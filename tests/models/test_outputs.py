"""Last layers: float32 products of features in any dtype, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mrcnn_jax.models.outputs import OutputLayer, float32_matmul, float32_outputs


def given(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, kernel and cotangent."""
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(rng.normal(size=(5, 7, 256)), dtype))
    kernel, cotangent = rng.normal(size=(256, 3)), rng.normal(size=(5, 7, 3))
    return x, kernel.astype(np.float32), cotangent.astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_and_gradients_are_those_of_float64(dtype: str) -> None:
    """Factors of 8 or 10 bits would be off by 1e-3."""
    x, kernel, cotangent = given(dtype)
    result, pull = jax.vjp(jax.jit(float32_matmul), jnp.asarray(x), jnp.asarray(kernel))
    of_x, of_kernel = pull(jnp.asarray(cotangent))
    wide, rows = x.astype(np.float64), x.astype(np.float64).reshape(-1, 256)
    assert result.dtype == of_kernel.dtype == jnp.float32
    np.testing.assert_allclose(result, wide @ kernel, atol=2e-5)
    np.testing.assert_allclose(of_kernel, rows.T @ cotangent.reshape(-1, 3), atol=2e-5)
    assert of_x.dtype == x.dtype
    bound = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]  # the result is rounded to that dtype
    np.testing.assert_allclose(np.float64(of_x), cotangent @ kernel.T, rtol=bound, atol=bound)


def test_several_layers_are_one_product() -> None:
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> list[jax.Array]:
            normal = nn.initializers.normal(1.0)
            return float32_outputs(
                x, OutputLayer(2, normal, name="first"), OutputLayer(5, normal, name="second")
            )

    x, *_ = given("float32")
    (first, second), variables = Head().init_with_output(jax.random.key(0), jnp.asarray(x))
    for name, found in (("first", first), ("second", second)):
        layer = jax.tree.map(np.asarray, variables["params"][name])
        np.testing.assert_allclose(found, x @ layer["kernel"] + layer["bias"], atol=1e-4)
    products = str(jax.make_jaxpr(Head().apply)(variables, jnp.asarray(x))).count("dot_general")
    assert (first.shape, second.shape, products) == ((5, 7, 2), (5, 7, 5), 1)
