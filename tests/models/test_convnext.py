"""ConvNeXt against NumPy loops; its padding, and the branches that training leaves out."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig
from mrcnn_jax.config.model import ConvNeXtConfig, ModelConfig, ResNetConfig, RPNConfig
from mrcnn_jax.models.convnext import ConvNeXt, drop_path_factors, gelu
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch, normalise
from mrcnn_jax.ops.sampling import drop_path_keys

TINY = ConvNeXtConfig(blocks=(1, 2, 1, 1), channels=(4, 6, 8, 10))
SMALL = ConvNeXtConfig(
    blocks=(1, 1, 1, 1), channels=(4, 6, 8, 10)
)  # gradients take long to compile
LEVELS = ("c2", "c3", "c4", "c5")
CANVAS = (64, 96)


@functools.cache
def variables(config: ConvNeXtConfig = TINY) -> dict[str, Any]:
    """Random numbers in every parameter: norms, biases and factors matter."""
    drawn = jax.eval_shape(
        lambda: ConvNeXt(config).init(jax.random.key(0), jnp.zeros((1, *CANVAS, 3)))
    )
    random = np.random.default_rng(1)
    flat = {}
    for path, leaf in flatten_dict(drawn, sep="/").items():
        kind = path.rsplit("/", 1)[1]
        if kind == "kernel":
            values = random.normal(size=leaf.shape) / math.sqrt(np.prod(leaf.shape[:-1]))
        else:
            values = random.normal(0.0 if kind == "bias" else 1.0, 0.3, leaf.shape)
        flat[path] = jnp.array(values, jnp.float32)
    return unflatten_dict(flat, sep="/")


def pixels(batch: int = 1, canvas: tuple[int, int] = CANVAS) -> jax.Array:
    values = np.random.default_rng(2).normal(size=(batch, *canvas, 3))
    return jnp.array(values, jnp.float32)


# -- the network in NumPy, from the paper's figures ------------------------------------------------


def numpy_norm(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def numpy_patches(x: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    size = len(p["kernel"])
    height, width = x.shape[0] // size, x.shape[1] // size
    y = np.empty((height, width, p["kernel"].shape[-1]))
    for i, j in np.ndindex(height, width):
        patch = x[i * size : (i + 1) * size, j * size : (j + 1) * size]
        y[i, j] = np.tensordot(patch, p["kernel"], 3) + p["bias"]
    return y


def numpy_depthwise(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    y = np.zeros_like(x)
    for i, j in np.ndindex(*x.shape[:2]):
        for di, dj in np.ndindex(7, 7):
            row, column = i + di - 3, j + dj - 3
            if 0 <= row < x.shape[0] and 0 <= column < x.shape[1]:
                y[i, j] += x[row, column] * kernel[di, dj, 0]
    return y


def numpy_block(x: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    y = numpy_norm(numpy_depthwise(x, p["kernel"]) + p["bias"], p["norm"])
    y = y @ p["expand"]["kernel"] + p["expand"]["bias"]
    y *= 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    y = y @ p["project"]["kernel"] + p["project"]["bias"]
    return x + p["gamma"] * y


def numpy_convnext(x: np.ndarray, p: dict[str, Any]) -> list[np.ndarray]:
    """c2..c5 of one image, 0 outside of which."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    x = numpy_norm(numpy_patches(x, p["stem"]), p["stem"]["norm"])
    maps = []
    for i, blocks in enumerate(TINY.blocks):
        stage = p[f"stage{i + 1}"]
        if i > 0:
            x = numpy_patches(numpy_norm(x, stage["downsample"]["norm"]), stage["downsample"])
        for block in range(blocks):
            x = numpy_block(x, stage[f"block{block}"])
        maps.append(numpy_norm(x, p[f"norm{i + 2}"]))
    return maps


@functools.cache
def program(remat: bool = False) -> Any:
    return jax.jit(ConvNeXt(TINY, remat=remat).apply)


def test_the_maps_equal_a_loop() -> None:
    image = pixels()
    found = program()(variables(), image)
    expected = numpy_convnext(np.asarray(image[0], np.float64), variables()["params"])
    for level, values in zip(LEVELS, expected, strict=True):
        np.testing.assert_allclose(found[level][0], values, rtol=1e-4, atol=1e-4, err_msg=level)


def test_gelu_and_its_derivative() -> None:
    x = np.array([-9.0, -3.0, -1.2, -0.4, 0.0, 0.3, 1.0, 2.5, 9.0], np.float32)
    cdf = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    density = np.exp(-0.5 * x.astype(float) ** 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(gelu(jnp.array(x)), x * cdf, atol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(gelu(x)))(jnp.array(x))
    np.testing.assert_allclose(slope, cdf + x * density, atol=1e-6)
    assert gelu(jnp.array(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_sizes_and_dtypes() -> None:
    """The parameters of the published ConvNeXt-T without its classifier, and the maps' norms."""
    model = ConvNeXt(ConvNeXtConfig(), dtype=jnp.bfloat16)
    features, shapes = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((2, 64, 96, 3)))
    )
    assert {name: value.shape for name, value in features.items()} == {
        f"c{i}": (2, 64 >> i, 96 >> i, 96 << (i - 2)) for i in (2, 3, 4, 5)
    }
    assert {value.dtype for value in features.values()} == {jnp.dtype(jnp.bfloat16)}
    leaves = jax.tree.leaves(shapes)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    classifier = 768 * 1000 + 1000 + 2 * 768
    norms = 2 * (96 + 192 + 384 + 768)
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 28_589_128 - classifier + norms


def test_initial_values() -> None:
    drawn = initialise(ConvNeXt(replace(TINY, layer_scale=0.25)), pixels(), seed=0)["params"]
    for path, leaf in flatten_dict(drawn, sep="/").items():
        kind = path.rsplit("/", 1)[1]
        if kind == "kernel":
            few = 1 / math.sqrt(2 * leaf.size)
            assert np.std(leaf) == pytest.approx(0.02, rel=5 * few), path
        else:
            assert np.all(leaf == {"bias": 0.0, "scale": 1.0, "gamma": 0.25}[kind]), path


def test_bfloat16_computes_nearly_the_same() -> None:
    exact = program()(variables(), pixels())
    rough = jax.jit(ConvNeXt(TINY, dtype=jnp.bfloat16).apply)(variables(), pixels())
    for level in LEVELS:
        error = jnp.abs(exact[level] - rough[level].astype(jnp.float32)).max()
        assert 0 < float(error) < 0.06 * float(jnp.abs(exact[level]).max()), level


# -- padding ---------------------------------------------------------------------------------------

SIZE = (50, 38)  # neither side is a multiple of a stride


def padded(canvas: tuple[int, int]) -> jax.Array:
    image = pixels(1, SIZE)
    return jnp.pad(image, [(0, 0), (0, canvas[0] - SIZE[0]), (0, canvas[1] - SIZE[1]), (0, 0)])


def on_image(stride: int) -> tuple[slice, slice]:
    return slice(-(-SIZE[0] // stride)), slice(-(-SIZE[1] // stride))


def test_features_do_not_depend_on_the_canvas() -> None:
    """Nor do gradients, also of values as drawn: there a cell without any signal has variance 0,
    by which each norm would multiply. An image that does not exist has no gradient."""
    sizes = jnp.array([SIZE], jnp.int32)

    def total(params: Any, images: jax.Array, valid: jax.Array) -> tuple[jax.Array, Any]:
        maps = ConvNeXt(SMALL).apply({"params": params}, images, image_sizes=sizes, valid=valid)
        cut = {level: maps[level][(slice(None), *on_image(2 ** int(level[1])))] for level in LEVELS}
        return sum((jnp.sum(jnp.sin(x)) for x in cut.values()), jnp.float32(0)), cut

    run = jax.jit(jax.grad(total, has_aux=True))
    random, exists = variables(SMALL)["params"], jnp.array([True])
    drawn = initialise(ConvNeXt(SMALL), pixels(), seed=3)["params"]
    for params in (random, drawn):
        small, large = (run(params, padded(canvas), exists) for canvas in ((64, 64), (96, 160)))
        for found, expected in zip(*map(jax.tree.leaves, (large, small)), strict=True):
            scale = float(jnp.abs(expected).max())
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale)
    gradients, _ = run(random, padded((64, 64)), jnp.array([False]))
    for name, tree in gradients.items():
        if not name.startswith("norm"):
            assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(tree)), name


# -- training --------------------------------------------------------------------------------------


def test_remat_gives_the_same_numbers() -> None:
    params = variables(SMALL)["params"]

    def total(params: Any, remat: bool) -> jax.Array:
        maps = ConvNeXt(SMALL, remat=remat).apply({"params": params}, pixels(1, (32, 32)))
        return sum((jnp.sum(jnp.sin(x)) for x in maps.values()), jnp.float32(0))

    gradients = [
        jax.jit(jax.grad(functools.partial(total, remat=r)))(params) for r in (True, False)
    ]
    for found, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale)
    jaxpr = str(jax.make_jaxpr(functools.partial(total, remat=True))(params))
    assert len(re.findall(r"= (?:remat2?|checkpoint)\[", jaxpr)) == sum(SMALL.blocks)


def test_branches_are_left_out_as_often_as_asked() -> None:
    """More often the later they come, never the first; what stays makes up for it."""
    config = replace(TINY, drop_path=0.4)
    keys = drop_path_keys(jax.random.key(0), jnp.arange(4000, dtype=jnp.int32))
    factors = np.stack(drop_path_factors(config, keys))[..., 0, 0, 0]
    rates = 0.4 * np.arange(5) / 4
    assert factors.shape == (5, 4000)
    assert (factors[0] == 1).all()
    for values, rate in zip(factors, rates, strict=True):
        np.testing.assert_allclose(np.unique(values)[-1], 1 / (1 - rate), rtol=1e-6)
        assert (values == 0).mean() == pytest.approx(rate, abs=0.03)
    assert drop_path_factors(config, None) == [None] * 5


def test_a_branch_left_out_passes_its_input_on() -> None:
    """Each image by its own index, whatever its place in the batch."""
    config = replace(TINY, drop_path=0.9)
    apply = jax.jit(ConvNeXt(config).apply)
    images = pixels(3)
    indices = jnp.array([5, 8, 13], jnp.int32)
    keys = drop_path_keys(jax.random.key(1), indices)
    found = apply(variables(), images, keys=keys)
    order = jnp.array([2, 0, 1])
    turned = apply(
        variables(), images[order], keys=drop_path_keys(jax.random.key(1), indices[order])
    )
    factors = drop_path_factors(config, keys)
    assert {float(f) for block in factors for f in block[:, 0, 0, 0]} > {0.0, 1.0}
    for number in range(3):
        # The factor of a branch can as well be in its gamma.
        flat = flatten_dict(variables(), sep="/")
        blocks = [
            f"params/stage{stage + 1}/block{block}/gamma"
            for stage, count in enumerate(TINY.blocks)
            for block in range(count)
        ]
        for path, factor in zip(blocks, factors, strict=True):
            flat[path] = flat[path] * factor[number, 0, 0]
        expected = program()(unflatten_dict(flat, sep="/"), images[number][None])
        place = int(jnp.argmax(order == number))
        for level in LEVELS:
            close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
            close(found[level][number], expected[level][0])
            close(turned[level][place], expected[level][0])


# -- in the network --------------------------------------------------------------------------------

MODEL = ModelConfig(
    fpn_channels=8,
    trunk="convnext",
    convnext=TINY,
    rpn=RPNConfig(scales=(8, 16, 32, 64, 128), batch_norm=False, pre_nms=60, proposals=12),
    box_head=BoxHeadConfig(hidden=16, pool_size=3, detections=6),
    mask_head=MaskHeadConfig(channels=8, convs=1, pool_size=4),
)


def test_the_whole_network_has_it_in_place_of_the_resnet() -> None:
    """And pixels outside of an image change nothing."""
    image = np.random.default_rng(5).integers(0, 256, (1, *CANVAS, 3)).astype(np.uint8)
    batch = example_batch(CANVAS).replace(images=image, image_sizes=np.array([[50, 70]], np.int32))
    model = MaskRCNN(MODEL)
    drawn = initialise(model, batch, seed=0)
    assert set(drawn["params"]) == {"convnext", "fpn", "rpn", "box_head", "mask_head"}
    features = jax.jit(functools.partial(model.apply, method="features"))
    other = image.copy()
    other[:, 50:], other[:, :, 70:] = 255, 9
    found, expected = (features(drawn, batch.replace(images=values)) for values in (other, image))
    assert sorted(expected) == ["p2", "p3", "p4", "p5", "p6"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("trunk", ["convnext", "resnet"])
def test_a_trunk_knows_where_the_image_ends(trunk: Any) -> None:
    """Its norms count no padding: by the modules themselves, called with the size."""
    resnet = ResNetConfig(depth=10, width=4, norm="live")
    model = MaskRCNN(replace(MODEL, trunk=trunk, resnet=resnet))
    image = np.random.default_rng(5).integers(0, 256, (1, *CANVAS, 3)).astype(np.uint8)
    batch = example_batch(CANVAS).replace(images=image, image_sizes=np.array([[50, 70]], np.int32))
    drawn = initialise(model, batch, seed=0)

    def by_hand(module: MaskRCNN, sizes: np.ndarray) -> Any:
        pixels = normalise(batch.images, batch.image_sizes, module.config)
        options = {} if trunk == "convnext" else {"live": True}
        trunk_of = getattr(module, trunk)
        return module.fpn(trunk_of(pixels, image_sizes=sizes, valid=batch.valid, **options))

    def result(function: Any) -> Any:
        apply = nn.apply(function, model, mutable=["batch_stats"])
        return jax.jit(apply)(drawn)

    found = result(lambda m: m.features(batch, live=True))
    expected = result(functools.partial(by_hand, sizes=batch.image_sizes))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)
    padded = result(functools.partial(by_hand, sizes=np.array([CANVAS], np.int32)))
    assert np.abs(padded[0]["p2"] - found[0]["p2"]).max() > 1e-3
