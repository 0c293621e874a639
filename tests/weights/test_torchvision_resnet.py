"""Every tensor of the file is used or left out on purpose, every leaf is filled, all else is an error with a name."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mrcnn_jax.config import ConfigError, ResNetConfig
from mrcnn_jax.models.resnet import ResNet
from mrcnn_jax.weights.torchvision_resnet import load_resnet

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
WIDTH = 4


def torchvision_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's state_dict at a width of 4, by hand."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_norm(conv: str, norm: str, out: int, into: int, size: int) -> None:
        shapes[f"{conv}.weight"] = (out, into, size, size)
        shapes.update({f"{norm}.{name}": (out,) for name in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{norm}.num_batches_tracked"] = ()

    conv_norm("conv1", "bn1", WIDTH, 3, 7)
    bottleneck = depth >= 50
    channels = WIDTH
    for layer, blocks in enumerate(BLOCKS[depth], 1):
        width = WIDTH * 2 ** (layer - 1)
        out = 4 * width if bottleneck else width
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            three, two = [(width, channels, 1), (width, width, 3), (out, width, 1)], [(width, channels, 3), (width, width, 3)]
            sizes = three if bottleneck else two
            for i, size in enumerate(sizes, 1):
                conv_norm(f"{name}.conv{i}", f"{name}.bn{i}", *size)
            if block == 0 and (layer > 1 or bottleneck):
                conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", out, channels, 1)
            channels = out
    return shapes | {"fc.weight": (10, channels), "fc.bias": (10,)}


def tensors_of(depth: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(depth)
    return {
        name: np.array(7) if name.endswith("num_batches_tracked") else random.normal(size=shape).astype(np.float32)
        for name, shape in torchvision_shapes(depth).items()
    }


def template_of(depth: int) -> dict:
    model = ResNet(ResNetConfig(depth=depth, width=WIDTH))  # type: ignore[arg-type]
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))


def load(folder: Path, tensors: dict[str, np.ndarray], depth: int) -> dict:
    np.savez(folder / "weights.npz", **tensors)
    return load_resnet(folder / "weights.npz", template_of(depth))


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_every_tensor_finds_its_place(depth: int, tmp_path: Path) -> None:
    tensors = tensors_of(depth)
    variables = load(tmp_path, tensors, depth)
    template = template_of(depth)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, template)
    leaves = flatten_dict(variables)
    assert {value.dtype for value in leaves.values()} == {np.dtype(np.float32)}
    used = [name for name in tensors if not name.startswith("fc.") and not name.endswith("num_batches_tracked")]
    assert len(leaves) == len(used)
    # The random values tell which tensor went where: each of ours is one of theirs, and no two the same.
    assert len({float(np.sum(value, dtype=np.float64)) for value in leaves.values()}) == len(used)
    params, stats = variables["params"], variables["batch_stats"]
    np.testing.assert_array_equal(params["stem"]["kernel"], tensors["conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(params["layer3"]["block1"]["conv2"]["scale"], tensors["layer3.1.bn2.weight"])
    np.testing.assert_array_equal(params["layer2"]["block0"]["downsample"]["bias"], tensors["layer2.0.downsample.1.bias"])
    np.testing.assert_array_equal(stats["layer4"]["block1"]["conv1"]["mean"], tensors["layer4.1.bn1.running_mean"])
    np.testing.assert_array_equal(stats["stem"]["var"], tensors["bn1.running_var"])


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = tensors_of(10)
    del tensors["layer2.0.bn1.running_var"]
    with pytest.raises(ConfigError, match=r"weights\.npz: no tensor for batch_stats/layer2/block0/conv1/var$"):
        load(tmp_path, tensors, 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer1.0.se.weight", r"layer1\.0\.se\.weight: unknown tensor"),
        ("layer1.1.conv1.weight", r"layer1\.1\.conv1\.weight: this model has no params/layer1/block1/conv1/kernel"),
        ("bn1.weight.extra", r"bn1\.weight\.extra: unknown tensor"),
    ],
)
def test_extra_tensor_is_named(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, tensors_of(10) | {name: np.zeros((4, 4, 3, 3), np.float32)}, 10)


@pytest.mark.parametrize("value", [np.zeros((4, 4, 1, 1), np.float32), np.zeros((4, 4), np.float32)])
def test_wrong_shape_is_named(value: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"layer1\.0\.conv1\.weight: shape .* does not fit params/layer1/block0/conv1/kernel \(3, 3, 4, 4\)"
    ):
        load(tmp_path, tensors_of(10) | {"layer1.0.conv1.weight": value}, 10)


def test_another_depth_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1\.weight: shape"):
        load(tmp_path, tensors_of(50), 34)
    with pytest.raises(ConfigError, match=r"layer1\.1\.conv1\.weight: this model has no"):
        load(tmp_path, tensors_of(18), 10)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bn1\.bias: dtype int64 is not floating point"):
        load(tmp_path, tensors_of(10) | {"bn1.bias": np.zeros(4, np.int64)}, 10)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.npz: no such weights file"):
        load_resnet(tmp_path / "absent.npz", template_of(10))
    whole = tmp_path / "whole.npz"
    np.savez(whole, **tensors_of(10))
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", conv1=np.array([None]))
    (tmp_path / "text.npz").write_text("not a zip\n")
    (tmp_path / "empty.npz").write_text("")
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:4000])
    for name in ("array.npy", "objects.npz", "text.npz", "empty.npz", "cut.npz"):
        with pytest.raises(ConfigError, match=f"{name}: not a readable npz file") as caught:
            load_resnet(tmp_path / name, template_of(10))
        assert "\n" not in str(caught.value)
