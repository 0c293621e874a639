"""Initialisation: the bits of a seed, statistics, and shapes without numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from mrcnn_jax.config.model import ResNetConfig
from mrcnn_jax.models.initialise import initialise, variable_shapes
from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
from mrcnn_jax.models.resnet import ResNet

MODEL = ResNet(ResNetConfig(depth=10, width=16))
IMAGES = np.zeros((1, 32, 32, 3), np.float32)


def test_same_seed_same_bits() -> None:
    first = initialise(MODEL, IMAGES, seed=3)
    jax.tree.map(np.testing.assert_array_equal, first, initialise(MODEL, IMAGES, seed=3))
    jax.tree.map(
        np.testing.assert_array_equal,
        first,
        initialise(MODEL, np.ones((2, 64, 64, 3), np.float32), seed=3),
    )
    other = initialise(MODEL, IMAGES, seed=4)
    kernels = {
        path: value for path, value in flatten_dict(first["params"]).items() if path[-1] == "kernel"
    }
    assert not any(
        np.array_equal(value, flatten_dict(other["params"])[path])
        for path, value in kernels.items()
    )
    assert len({float(value.ravel()[0]) for value in kernels.values()}) == len(
        kernels
    )  # no two layers alike


def test_statistics() -> None:
    variables = initialise(MODEL, IMAGES, seed=0)
    for path, value in flatten_dict(variables["params"]).items():
        if path[-1] != "kernel":
            np.testing.assert_array_equal(value, 1.0 if path[-1] == "scale" else 0.0)
            continue
        height, width, _, out = value.shape
        expected = np.sqrt(2 / (height * width * out))  # He, by fan out
        error = (
            5 * expected / np.sqrt(value.size)
        )  # five standard deviations of the mean, seven of the deviation
        assert abs(float(value.mean())) < error, path
        assert float(value.std()) == pytest.approx(expected, abs=error), path
        assert float(jnp.abs(value).max()) > 2.1 * expected, path  # not truncated
    for path, value in flatten_dict(variables["batch_stats"]).items():
        np.testing.assert_array_equal(value, {"mean": 0.0, "var": 1.0}[path[-1]])


def test_shapes_are_those_of_what_is_made() -> None:
    """On another canvas."""
    config = tiny.get_config().model
    made = initialise(MaskRCNN(config), example_batch((128, 96)), seed=0)
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made)
    assert expected == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variable_shapes(config))
