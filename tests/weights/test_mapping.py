"""Layouts by plain loops; every tensor is used or left out on purpose, every leaf is filled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.models.layers import conv2d
from mrcnn_jax.models.mask_head import TransposedConv, depth_to_space
from mrcnn_jax.weights import mapping
from mrcnn_jax.weights.mapping import Assigned, Rule, assign, fill

RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


# -- layouts: torch's formula in loops against our layer with the converted kernel -----------------


@pytest.mark.parametrize("strides", [1, 2])
def test_convolution(strides: int) -> None:
    x, weight = (
        normal(2, 6, 7),
        normal(3, 2, 3, 3),
    )  # channels, height, width; out, in, height, width
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    rows, columns = (6 - 1) // strides + 1, (7 - 1) // strides + 1
    expected = np.zeros((3, rows, columns))
    for o, i, y, x_, ky, kx in np.ndindex(3, 2, rows, columns, 3, 3):
        expected[o, y, x_] += weight[o, i, ky, kx] * padded[i, strides * y + ky, strides * x_ + kx]
    ours = conv2d(
        jnp.asarray(x.transpose(1, 2, 0)[None]), jnp.asarray(mapping.convolution(weight)), strides
    )
    np.testing.assert_allclose(np.asarray(ours)[0].transpose(2, 0, 1), expected, atol=1e-5)


def test_transposed_convolution() -> None:
    x, weight = (
        normal(2, 4, 5),
        normal(2, 3, 2, 2),
    )  # channels, height, width; in, out, height, width
    expected = np.zeros((3, 8, 10))
    for i, o, y, x_, ky, kx in np.ndindex(2, 3, 4, 5, 2, 2):
        expected[o, 2 * y + ky, 2 * x_ + kx] += x[i, y, x_] * weight[i, o, ky, kx]
    layer = TransposedConv(3, kernel_size=2)
    variables = {
        "params": {
            "kernel": mapping.transposed_convolution(weight),
            "bias": np.zeros(3, np.float32),
        }
    }
    ours = depth_to_space(layer.apply(variables, jnp.asarray(x.transpose(1, 2, 0)[None])))
    np.testing.assert_allclose(np.asarray(ours)[0].transpose(2, 0, 1), expected, atol=1e-5)


def test_linear_and_pointwise() -> None:
    x, weight = normal(4), normal(3, 4)
    expected = [sum(weight[o, i] * x[i] for i in range(4)) for o in range(3)]
    for kernel in (mapping.linear(weight), mapping.pointwise(weight[:, :, None, None])):
        np.testing.assert_allclose(
            nn.Dense(3, use_bias=False).apply({"params": {"kernel": kernel}}, x),
            expected,
            rtol=1e-5,
        )


def test_linear_of_flattened_features() -> None:
    x, weight = normal(2, 7, 7), normal(3, 2 * 7 * 7)  # channels first: flattened c, y, x
    expected = [
        sum(weight[o, (c * 7 + y) * 7 + x_] * x[c, y, x_] for c, y, x_ in np.ndindex(2, 7, 7))
        for o in range(3)
    ]
    ours = x.transpose(1, 2, 0).reshape(-1) @ mapping.linear_of_7x7(weight)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_channels_of_images() -> None:
    pixel, kernel = normal(3), normal(1, 1, 3, 5)  # B, G, R
    np.testing.assert_allclose(
        pixel[::-1] @ mapping.bgr_input(kernel)[0, 0], pixel @ kernel[0, 0], rtol=1e-5
    )


def test_rows_of_classes() -> None:
    rows = np.arange(4)  # background, 1, 2, 3
    assert mapping.without_background(rows).tolist() == [1, 2, 3]
    boxes = np.arange(12).reshape(3, 4)  # background, 1, 2: a box each
    assert (
        mapping.without_background_box(boxes.reshape(12)).reshape(2, 4).tolist()
        == boxes[1:].tolist()
    )
    assert mapping.background_first(np.array([1, 2, 3, 0])).tolist() == [0, 1, 2, 3]
    assert mapping.background_first(np.arange(6).reshape(3, 2)).tolist() == [[4, 5], [0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (mapping.convolution, (3, 4)),
        (mapping.transposed_convolution, (3, 4)),
        (mapping.pointwise, (3, 4, 3, 3)),
        (mapping.linear, (3, 4, 1, 1)),
        (mapping.linear_of_7x7, (3, 50)),
    ],
)
def test_another_kind_of_tensor_is_refused(layout: mapping.Layout, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"axes|reshape|transpose"):
        layout(normal(*shape))


# -- the map's application -------------------------------------------------------------------------

RULES = (
    Rule(r"conv(\d)\.weight", r"params/layer\1/kernel", (mapping.convolution,)),
    Rule(r"conv(\d)\.bias", r"params/layer\1/bias"),
    Rule(r"(?:bn|norm)\.mean", "batch_stats/norm/mean"),
)
LEFT_OUT = (r"fc\..*",)
TEMPLATE = {
    "params": {
        f"layer{i}": {"kernel": np.zeros((3, 3, 2, 4)), "bias": np.zeros(4)} for i in (1, 2)
    },
    "batch_stats": {"norm": {"mean": jax.ShapeDtypeStruct((4,), jnp.float32)}},
}


def tensors() -> dict[str, np.ndarray]:
    kernels = {
        f"conv{i}.{name}": normal(*shape)
        for i in (1, 2)
        for name, shape in (("weight", (4, 2, 3, 3)), ("bias", (4,)))
    }
    return {**kernels, "bn.mean": normal(4), "fc.weight": normal(9), "fc.count": np.array(3)}


def load(tensors: dict[str, np.ndarray]) -> dict:
    return fill(TEMPLATE, assign(tensors, RULES, LEFT_OUT, "file"), tensors, "file")


def test_every_tensor_finds_its_place() -> None:
    source = tensors()
    source["conv2.bias"] = source["conv2.bias"].astype(np.float16)
    source["bn.mean"] = source["bn.mean"].astype(jnp.bfloat16)
    variables = load(source)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, TEMPLATE)
    assert {(leaf.dtype, leaf.flags.c_contiguous) for leaf in jax.tree.leaves(variables)} == {
        (np.dtype(np.float32), True)
    }
    np.testing.assert_array_equal(
        variables["params"]["layer1"]["kernel"], source["conv1.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(variables["params"]["layer2"]["bias"], source["conv2.bias"])
    np.testing.assert_array_equal(
        variables["batch_stats"]["norm"]["mean"], source["bn.mean"].astype(np.float32)
    )


def test_assignments_are_by_name_alone() -> None:
    assert assign(["conv1.bias", "fc.x"], RULES, LEFT_OUT, "file") == {
        "params/layer1/bias": Assigned("conv1.bias", ())
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv1.weight": None}, "file: no tensor for params/layer1/kernel$"),
        (dict.fromkeys(tensors()), "file: no tensor for .*, .*, .* and 2 more$"),
        ({"conv1.extra": normal(4)}, r"file: conv1\.extra: unknown tensor"),
        ({"conv1.bias.x": normal(4)}, r"file: conv1\.bias\.x: unknown tensor"),
        ({"xconv1.bias": normal(4)}, r"file: xconv1\.bias: unknown tensor"),
        ({"conv3.bias": normal(4)}, r"file: conv3\.bias: this model has no params/layer3/bias"),
        (
            {"norm.mean": normal(4)},
            r"file: norm\.mean: batch_stats/norm/mean was filled by bn\.mean already",
        ),
        (
            {"conv1.bias": normal(5)},
            r"file: conv1\.bias: shape \(5,\) does not fit params/layer1/bias \(4,\)",
        ),
        (
            {"conv1.weight": normal(4, 2)},
            r"file: conv1\.weight: shape \(4, 2\) does not fit params/layer1/kernel \(3, 3, 2, 4\)",
        ),
        (
            {"conv1.weight": normal(2, 4, 3, 3)},
            r"file: conv1\.weight: shape \(2, 4, 3, 3\) does not fit params/layer1/kernel",
        ),
        ({"conv1.bias": np.arange(4)}, r"file: conv1\.bias: dtype int64 is not floating point"),
    ],
)
def test_whatever_does_not_fit_is_named(change: dict[str, np.ndarray | None], message: str) -> None:
    changed = {name: tensor for name, tensor in (tensors() | change).items() if tensor is not None}
    with pytest.raises(ConfigError, match=message):
        load(changed)


def test_two_rules_for_one_tensor() -> None:
    with pytest.raises(ConfigError, match=r"file: conv1\.bias: two rules of the map match it"):
        assign(["conv1.bias"], (*RULES, Rule(".*bias", "params/x")), (), "file")


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("params/kernel", np.nan, "not finite"),
        ("params/kernel", 1e39, "not finite"),  # of float64, beyond float32
        ("batch_stats/bn/mean", -np.inf, "not finite"),
        ("batch_stats/bn/var", -1.0, "negative, but it is a variance"),
    ],
)
def test_numbers_that_a_network_cannot_have_are_named(path: str, value: float, fault: str) -> None:
    template = unflatten_dict({path: np.zeros(3)}, sep="/")
    assigned = {path: Assigned("theirs.weight", ())}
    tensors = {"theirs.weight": np.array([-1.0, 0.5, 2.0])}
    if path.endswith("/var"):
        tensors["theirs.weight"][0] = 0.0
    fill(template, assigned, tensors, "file.pth")
    tensors["theirs.weight"][1] = value
    with pytest.raises(
        ConfigError, match=rf"^file\.pth: theirs\.weight: 1 of 3 numbers are {fault}"
    ):
        fill(template, assigned, tensors, "file.pth")
