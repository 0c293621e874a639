"""ResNet and its layers against NumPy, flax's batch norm and pooling, torchvision's features."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mrcnn_jax.config.model import ResNetConfig
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.layers import ConvNorm, cell_mask, conv2d, max_pool, relu
from mrcnn_jax.models.resnet import RESNET_BLOCKS, Block, ResNet
from mrcnn_jax.weights.network import read_network

LEVELS = ("c2", "c3", "c4", "c5")


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def numpy_conv(x: np.ndarray, weight: np.ndarray, stride: int = 1) -> np.ndarray:
    """torch's conv2d without bias, NHWC input, OIHW weight, padding (k - 1) / 2."""
    k = weight.shape[-1]
    p = (k - 1) // 2
    height, width = ((n + 2 * p - k) // stride + 1 for n in x.shape[1:3])
    x = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    y = np.zeros((x.shape[0], height, width, weight.shape[0]))
    for i in range(k):
        for j in range(k):
            y += (
                x[:, i : i + stride * height : stride, j : j + stride * width : stride][
                    :, :height, :width
                ]
                @ weight[:, :, i, j].T
            )
    return y


def numpy_max_pool(x: np.ndarray) -> np.ndarray:
    b, h, w, c = x.shape
    y = np.empty((b, (h + 1) // 2, (w + 1) // 2, c), x.dtype)
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            y[:, i, j] = x[:, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2].max(
                (1, 2)
            )
    return y


def numpy_resnet18(x: np.ndarray, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """c2..c5 straight from torchvision's tensors."""

    def conv_norm(x: np.ndarray, conv: str, norm: str, stride: int) -> np.ndarray:
        y = (
            numpy_conv(x, tensors[f"{conv}.weight"], stride) - tensors[f"{norm}.running_mean"]
        ) / np.sqrt(tensors[f"{norm}.running_var"] + 1e-5)
        return y * tensors[f"{norm}.weight"] + tensors[f"{norm}.bias"]

    x = numpy_max_pool(np.maximum(conv_norm(x, "conv1", "bn1", 2), 0))
    features = []
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = np.maximum(conv_norm(x, f"{name}.conv1", f"{name}.bn1", stride), 0)
            y = conv_norm(y, f"{name}.conv2", f"{name}.bn2", 1)
            if stride == 2:
                x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", 2)
            x = np.maximum(x + y, 0)
        features.append(x)
    return features


def shapes_of(model: ResNet) -> dict:
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))


def load(path: Path) -> dict:
    variables = read_network(path).variables()
    return {kind: modules["resnet"] for kind, modules in variables.items()}


@pytest.mark.data
def test_resnet50_gives_the_reference_features(data_folder: Path) -> None:
    model = ResNet(ResNetConfig(depth=50))
    variables = load(data_folder / "weights/pqf_resnet50_large.npz")
    reference = np.load(data_folder / "weights/pqf_resnet50_large_reference_features.npz")
    features = jax.jit(model.apply)(variables, reference["input_nhwc"])
    for level in LEVELS:
        assert features[level].shape == reference[f"{level}_nhwc"].shape
        assert relative_error(features[level], reference[f"{level}_nhwc"]) <= 1e-4, level


@pytest.mark.data
def test_resnet50_v1_is_not_v1_5(data_folder: Path) -> None:
    """The same tensors, the stride in the wrong convolution: c2 is the same, the rest is not."""
    model = ResNet(ResNetConfig(depth=50, stride_in_1x1=True))
    variables = load(data_folder / "weights/pqf_resnet50_large.npz")
    reference = np.load(data_folder / "weights/pqf_resnet50_large_reference_features.npz")
    features = jax.jit(model.apply)(variables, reference["input_nhwc"])
    errors = [relative_error(features[level], reference[f"{level}_nhwc"]) for level in LEVELS]
    assert errors[0] <= 1e-4
    assert min(errors[1:]) > 0.05


@pytest.mark.data
def test_resnet18_equals_numpy(data_folder: Path) -> None:
    model = ResNet(ResNetConfig(depth=18))
    path = data_folder / "weights/pqf_resnet18_small.npz"
    image = np.load(data_folder / "weights/pqf_resnet50_large_reference_features.npz")[
        "input_nhwc"
    ][:, 20:85, :96]  # 65 x 96: odd maps too
    features = jax.jit(model.apply)(load(path), image)
    for level, expected in zip(LEVELS, numpy_resnet18(image, dict(np.load(path))), strict=True):
        assert features[level].shape == expected.shape
        assert relative_error(features[level], expected) <= 1e-4, level


# Parameters of torchvision's resnet18 .. resnet101 without the classifier (1000 x features + 1000).
@pytest.mark.parametrize(
    ("depth", "count"), [(18, 11_176_512), (34, 21_284_672), (50, 23_508_032), (101, 42_500_160)]
)
def test_depths_have_the_parameters_of_the_paper(depth: int, count: int) -> None:
    model = ResNet(ResNetConfig(depth=depth))  # type: ignore[arg-type]
    assert (
        sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(shapes_of(model)["params"]))
        == count
    )


@pytest.mark.parametrize("depth", sorted(RESNET_BLOCKS))
def test_strides_and_dtypes(depth: int) -> None:
    model = ResNet(ResNetConfig(depth=depth, width=8), dtype=jnp.bfloat16)  # type: ignore[arg-type]
    features, variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((2, 64, 96, 3)))
    )
    widen = 4 if RESNET_BLOCKS[depth].bottleneck else 1
    assert {name: value.shape for name, value in features.items()} == {
        f"c{i}": (2, 64 >> i, 96 >> i, widen * 8 * 2 ** (i - 2)) for i in (2, 3, 4, 5)
    }
    assert {value.dtype for value in features.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_v1_reads_even_cells_only(stride_in_1x1: bool) -> None:
    """With the stride in its 1x1 a bottleneck never sees an odd row; in its 3x3 it does."""
    block = Block(4, 2, bottleneck=True, stride_in_1x1=stride_in_1x1)
    apply = partial(block.apply, live=False, mask_in=None, mask_out=None)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 8))
    variables = jax.jit(
        lambda: block.init(jax.random.key(1), x, live=False, mask_in=None, mask_out=None)
    )()
    moved = x.at[:, 1::2].add(1.0)
    assert bool(jnp.array_equal(apply(variables, x), apply(variables, moved))) == stride_in_1x1


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("shape", [(8, 6), (9, 7)])
def test_convolve_pads_as_torch(size: int, stride: int, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(2, *shape, 3)).astype(np.float32)
    weight = random.normal(size=(5, 3, size, size)).astype(np.float32)
    ours = conv2d(jnp.array(x), jnp.array(weight.transpose(2, 3, 1, 0)), stride)
    expected = numpy_conv(x, weight, stride)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("shape", [(8, 6), (9, 7), (1, 2)])
def test_max_pool_and_its_gradient(shape: tuple[int, int]) -> None:
    """Distinct, mostly negative values: a pool that pads with zeros fails."""
    random = np.random.default_rng(1)
    x = (
        jnp.array(
            random.permutation(2 * shape[0] * shape[1] * 3).reshape(2, *shape, 3).astype(np.float32)
        )
        - 10_000.0
    )
    np.testing.assert_array_equal(max_pool(x), numpy_max_pool(np.asarray(x)))
    weights = jnp.array(random.normal(size=max_pool(x).shape).astype(np.float32))
    ours = jax.grad(lambda x: jnp.sum(weights * max_pool(x)))(x)
    theirs = jax.grad(
        lambda x: jnp.sum(weights * nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))
    )(x)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_relu_and_its_derivatives() -> None:
    x = jnp.array([-2.0, -0.0, 0.0, 1e-30, 3.0])
    np.testing.assert_array_equal(relu(x), [0, 0, 0, np.float32(1e-30), 3])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(relu(x)))(x), [0, 0, 0, 1, 1])


def test_cell_mask_equals_a_loop() -> None:
    sizes, valid = (
        np.array([[30, 64], [33, 1], [64, 64], [0, 8]], np.int32),
        np.array([True, True, False, True]),
    )
    for stride in (4, 32):
        grid = (64 // stride, 64 // stride)
        mask = np.asarray(cell_mask(jnp.array(sizes), jnp.array(valid), stride, grid))
        assert mask.shape == (4, *grid, 1)
        for b, i, j in np.ndindex(4, *grid):
            assert mask[b, i, j, 0] == (
                valid[b] and i * stride < sizes[b, 0] and j * stride < sizes[b, 1]
            )


class Reference(nn.Module):
    """Convolution, flax's batch norm, ReLU."""

    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, live: bool, mask: jax.Array | None) -> jax.Array:
        x = nn.Conv(5, (3, 3), self.strides, padding=1, use_bias=False, name="conv")(x)
        return nn.relu(
            nn.BatchNorm(use_running_average=not live, momentum=0.9, epsilon=1e-5, name="norm")(
                x, mask=mask
            )
        )


def both_variables(x: jax.Array) -> tuple[dict, dict]:
    """Random variables for ConvNorm, and the same ones for Reference."""
    random = np.random.default_rng(2)
    params = {
        "kernel": random.normal(size=(3, 3, x.shape[-1], 5)),
        "scale": random.normal(size=5),  # of either sign
        "bias": random.normal(size=5),
    }
    stats = {"mean": random.normal(size=5), "var": random.uniform(0.3, 3, size=5)}
    params, stats = (
        {name: jnp.array(value, jnp.float32) for name, value in tree.items()}
        for tree in (params, stats)
    )
    norm = {name: params[name] for name in ("scale", "bias")}
    return (
        {"params": params, "batch_stats": stats},
        {
            "params": {"conv": {"kernel": params["kernel"]}, "norm": norm},
            "batch_stats": {"norm": stats},
        },
    )


@pytest.mark.parametrize("strides", [1, 2])
def test_folded_equals_batch_norm(strides: int) -> None:
    x = jax.random.normal(jax.random.key(3), (2, 8, 6, 3))
    ours, theirs = both_variables(x)
    layer = ConvNorm(5, 3, strides)
    np.testing.assert_allclose(
        layer.apply(ours, x, live=False),
        Reference(strides).apply(theirs, x, False, None),
        atol=1e-5,
    )

    def loss(apply, params: dict, stats: dict, *args, **kwargs) -> jax.Array:
        return jnp.sum(jnp.sin(apply({"params": params, "batch_stats": stats}, *args, **kwargs)))

    a = jax.grad(partial(loss, layer.apply))(ours["params"], ours["batch_stats"], x, live=False)
    b = jax.grad(partial(loss, Reference(strides).apply))(
        theirs["params"], theirs["batch_stats"], x, False, None
    )
    np.testing.assert_allclose(a["kernel"], b["conv"]["kernel"], rtol=1e-4, atol=1e-4)
    for name in ("scale", "bias"):
        np.testing.assert_allclose(a[name], b["norm"][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strides", [1, 2])
def test_live_equals_batch_norm(strides: int, masked: bool) -> None:
    """Values, running statistics and gradients, for the cells of two images of different size."""
    x = jax.random.normal(jax.random.key(4), (2, 8, 6, 3)) + 2.0
    ours, theirs = both_variables(x)
    mask = None
    if masked:
        mask = cell_mask(
            jnp.array([[5, 6], [8, 3]], jnp.int32),
            jnp.array([True, True]),
            strides,
            (8 // strides, 6 // strides),
        )

    def run(
        params: dict, x: jax.Array, reference: bool
    ) -> tuple[jax.Array, tuple[jax.Array, dict]]:
        if reference:
            model, stats, args, kwargs = (
                Reference(strides),
                theirs["batch_stats"],
                (x, True, mask),
                {},
            )
        else:
            model, stats, args, kwargs = (
                ConvNorm(5, 3, strides),
                ours["batch_stats"],
                (x,),
                {"live": True, "mask": mask},
            )
        y, moved = model.apply(
            {"params": params, "batch_stats": stats}, *args, mutable=["batch_stats"], **kwargs
        )
        return jnp.sum(jnp.sin(y)), (y, moved["batch_stats"])

    grad = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    (_, (y, stats)), (params_gradient, x_gradient) = grad(ours["params"], x, False)
    (_, (y_ref, stats_ref)), (params_gradient_ref, x_gradient_ref) = grad(theirs["params"], x, True)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(y, y_ref)
    close(x_gradient, x_gradient_ref)
    close(params_gradient["kernel"], params_gradient_ref["conv"]["kernel"])
    for name in ("scale", "bias"):
        close(params_gradient[name], params_gradient_ref["norm"][name])
    for name in ("mean", "var"):
        close(stats[name], stats_ref["norm"][name])


def test_padding_does_not_move_live_statistics() -> None:
    """1e9 outside the mask changes no bit inside, nor of statistics and gradients.

    Without a cell nothing moves."""
    x = jax.random.normal(jax.random.key(5), (2, 4, 4, 3))
    layer = ConvNorm(5, 1)
    variables = jax.jit(lambda: layer.init(jax.random.key(6), x, live=True))()
    mask = cell_mask(jnp.array([[3, 4], [4, 2]], jnp.int32), jnp.array([True, True]), 1, (4, 4))

    @jax.jit
    def run(x: jax.Array, mask: jax.Array) -> tuple:
        def loss(params: dict) -> tuple:
            y, moved = layer.apply(
                {**variables, "params": params}, x, live=True, mask=mask, mutable=["batch_stats"]
            )
            inside = jnp.where(mask, y, 0.0)
            return jnp.sum(jnp.sin(inside)), (inside, moved)

        return jax.grad(loss, has_aux=True)(variables["params"])

    clean, poisoned = run(x, mask), run(jnp.where(mask, x, 1e9), mask)
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
    assert not np.array_equal(clean[1][1]["batch_stats"]["mean"], variables["batch_stats"]["mean"])
    gradient, (_, moved) = run(x, jnp.zeros_like(mask))
    jax.tree.map(np.testing.assert_array_equal, moved["batch_stats"], variables["batch_stats"])
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))


def test_live_resnet_reads_images_only() -> None:
    """An invalid image of any content moves no running statistic; a valid one moves all."""
    model = ResNet(ResNetConfig(depth=10, width=4, norm="live"))
    images = jax.random.normal(jax.random.key(7), (2, 64, 64, 3))
    variables = initialise(model, images, seed=8)
    sizes = jnp.full((2, 2), 64, jnp.int32)

    @jax.jit
    def run(images: jax.Array, valid: jax.Array) -> dict:
        return model.apply(
            variables, images, live=True, image_sizes=sizes, valid=valid, mutable=["batch_stats"]
        )[1]["batch_stats"]

    first = jnp.array([True, False])
    stats = run(images, first)
    jax.tree.map(np.testing.assert_array_equal, stats, run(images.at[1].set(1e9), first))
    moved = jax.tree.map(
        lambda a, b: not np.allclose(a, b, rtol=1e-3), stats, run(images, jnp.array([True, True]))
    )
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_bottleneck_masks_have_the_resolution_of_their_layer(stride_in_1x1: bool) -> None:
    """Live, layers without ReLU have mean 0 over the cells of their own mask."""
    block = Block(4, 2, bottleneck=True, stride_in_1x1=stride_in_1x1)
    x = jax.random.normal(jax.random.key(13), (1, 8, 8, 8))
    masks = {
        f"mask_{name}": cell_mask(
            jnp.array([[5, 3]], jnp.int32), jnp.array([True]), stride, (8 // stride, 8 // stride)
        )
        for name, stride in (("in", 1), ("out", 2))
    }
    variables = jax.jit(block.init, static_argnames="live")(
        jax.random.key(14), x, live=True, **masks
    )
    kernel = variables["params"]["conv1"]["kernel"]
    stats = block.apply(variables, x, live=True, **masks, mutable=["batch_stats"])[1]["batch_stats"]
    # conv1 is 1x1: the mean of its output is that of its input's cells times the kernel.
    step = 2 if stride_in_1x1 else 1
    expected = np.asarray(x)[0, :5:step, :3:step].mean((0, 1)) @ np.asarray(kernel)[0, 0]
    np.testing.assert_allclose(stats["conv1"]["mean"], 0.1 * expected, rtol=1e-4, atol=1e-6)
    expected = (
        np.asarray(x)[0, :5:2, :3:2].mean((0, 1))
        @ np.asarray(variables["params"]["downsample"]["kernel"])[0, 0]
    )
    np.testing.assert_allclose(stats["downsample"]["mean"], 0.1 * expected, rtol=1e-4, atol=1e-6)


def test_cells_on_the_image_count_at_every_stride() -> None:
    """The statistics of res2..res5 cover the cells i * stride < size of the layer before."""
    model = ResNet(ResNetConfig(depth=10, width=4, norm="live"))
    images = (
        jax.random.normal(jax.random.key(9), (1, 128, 128, 3))
        .at[:, 70:]
        .set(0.0)
        .at[:, :, 33:]
        .set(0.0)
    )
    variables = initialise(model, images, seed=10)
    sizes = jnp.array([[70, 33]], jnp.int32)

    def run(images: jax.Array) -> tuple:
        return model.apply(
            variables,
            images,
            live=True,
            image_sizes=sizes,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
        )

    _, state = jax.jit(run)(images)
    stats, seen = state["batch_stats"], state["intermediates"]
    for i, stride in ((2, 8), (3, 16), (4, 32)):
        # conv2 of the block has no ReLU: what it returns has mean 0 and variance 1 over the cells
        # it counts.
        y = np.asarray(seen[f"layer{i}"]["block0"]["conv2"]["__call__"][0])[0]
        cells = y[: -(-70 // stride), : -(-33 // stride)].reshape(-1, y.shape[-1])
        np.testing.assert_allclose(cells.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(cells.var(0), 1, atol=2e-2)
        assert np.all(np.isfinite(stats[f"layer{i}"]["block0"]["conv2"]["var"]))


def test_frozen_config_is_never_live() -> None:
    """norm="frozen": live makes no difference, and batch_stats need not be mutable."""
    model = ResNet(ResNetConfig(depth=10, width=4))
    images = jax.random.normal(jax.random.key(11), (1, 32, 32, 3))
    variables = initialise(model, images, seed=12)
    apply = jax.jit(model.apply, static_argnames="live")
    jax.tree.map(
        np.testing.assert_array_equal,
        apply(variables, images, live=True),
        apply(variables, images, live=False),
    )
