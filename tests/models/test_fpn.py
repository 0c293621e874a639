"""FPN against loops over cells."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.models.fpn import FPN, upsample_nearest

SIZES = {
    "even": {"c2": (16, 24), "c3": (8, 12), "c4": (4, 6), "c5": (2, 3)},
    "odd": {"c2": (15, 9), "c3": (8, 5), "c4": (4, 3), "c5": (2, 2)},
}


def features_of(sizes: dict[str, tuple[int, int]]) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    return {
        name: jnp.array(random.normal(size=(2, *size, 3 + i)).astype(np.float32))
        for i, (name, size) in enumerate(sizes.items())
    }


def randomised(variables: dict) -> dict:
    """Every leaf normal(1), biases included."""
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.array(random.normal(size=leaf.shape).astype(np.float32)), variables
    )


def numpy_fpn(features: dict[str, np.ndarray], params: dict) -> dict[str, np.ndarray]:
    merged: dict[int, np.ndarray] = {}
    for level in (5, 4, 3, 2):
        x, layer = features[f"c{level}"], params[f"lateral{level}"]
        merged[level] = x @ layer["kernel"] + layer["bias"]
        if level < 5:
            for i, j in np.ndindex(*x.shape[1:3]):
                merged[level][:, i, j] += merged[level + 1][:, i // 2, j // 2]
    pyramid = {}
    for level, x in merged.items():
        kernel, out = params[f"output{level}"]["kernel"], np.zeros_like(x)
        for i, j in np.ndindex(*x.shape[1:3]):
            for di, dj in np.ndindex(3, 3):
                row, column = i + di - 1, j + dj - 1
                if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                    out[:, i, j] += x[:, row, column] @ kernel[di, dj]
        pyramid[f"p{level}"] = out + params[f"output{level}"]["bias"]
    pyramid["p6"] = pyramid["p5"][:, ::2, ::2]
    return pyramid


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_fpn_equals_loops(sizes: dict[str, tuple[int, int]]) -> None:
    model, features = FPN(channels=4), features_of(sizes)
    variables = randomised(jax.eval_shape(model.init, jax.random.key(0), features))
    pyramid = jax.jit(model.apply)(variables, features)
    expected = numpy_fpn(*jax.tree.map(np.asarray, (features, variables["params"])))
    assert list(pyramid) == ["p2", "p3", "p4", "p5", "p6"]
    for name, value in expected.items():
        assert pyramid[name].shape == value.shape
        np.testing.assert_allclose(pyramid[name], value, rtol=1e-4, atol=1e-4)


def test_upsample_and_its_gradient() -> None:
    x = jnp.arange(12, dtype=jnp.float32).reshape(1, 2, 3, 2)
    np.testing.assert_array_equal(
        upsample_nearest(x, (3, 5)), np.repeat(np.repeat(x, 2, 1), 2, 2)[:, :3, :5]
    )
    gradient = jax.grad(lambda x: jnp.sum(upsample_nearest(x, (3, 5))))(x)
    np.testing.assert_array_equal(
        gradient[0, :, :, 0], [[4, 4, 2], [2, 2, 1]]
    )  # how often each cell was shown


def test_initialisation_is_xavier() -> None:
    model, features = FPN(channels=64), features_of(SIZES["even"])
    params = jax.jit(model.init)(jax.random.key(2), features)["params"]
    assert set(params) == {
        f"{kind}{level}" for kind in ("lateral", "output") for level in (2, 3, 4, 5)
    }
    for name, layer in params.items():
        cells = 9 if name.startswith("output") else 1
        bound = np.sqrt(6 / (cells * (layer["kernel"].shape[-2] + 64)))
        assert np.abs(layer["kernel"]).max() <= bound
        assert np.std(layer["kernel"]) == pytest.approx(bound / np.sqrt(3), rel=0.1)
        np.testing.assert_array_equal(layer["bias"], 0)


def test_bfloat16_keeps_float32_parameters() -> None:
    pyramid, variables = jax.eval_shape(
        FPN(channels=8, dtype=jnp.bfloat16).init_with_output,
        jax.random.key(0),
        features_of(SIZES["even"]),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(pyramid)} == {jnp.dtype(jnp.bfloat16)}
