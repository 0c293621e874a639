"""timm's ResNets and ConvNeXts, saved as on its hub: their features, and networks that only look
like one of them."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import state_dicts
from parity import real, seeded
from parity.compare import RELATIVE, Measured, relative_error
from parity.ours import convnext_stages

pytest.importorskip("timm")
import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.model import ResNetConfig
from mrcnn_jax.models.convnext import ConvNeXt
from mrcnn_jax.models.mask_rcnn import normalise
from mrcnn_jax.models.resnet import RESNET_BLOCKS, ResNet
from mrcnn_jax.weights import convnext_families
from mrcnn_jax.weights.families import family_of
from mrcnn_jax.weights.mapping import assign, fill
from mrcnn_jax.weights.network import read_network

PIXELS = {"mean": (0.5, 0.45, 0.4), "std": (0.3, 0.25, 0.2)}


def saved(name: str, folder: Path) -> torch.nn.Module:
    """A model of seeded weights, whose running statistics matter, and its files in `folder`."""
    model = timm.create_model(name, pretrained_cfg_overlay=PIXELS).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = seeded.seeded_tensors(shapes, seed=0)
    tensors |= seeded.unfolded_norms(tensors, epsilon=1e-5, seed=0)  # epsilon matters
    model.load_state_dict({name: torch.from_numpy(values) for name, values in tensors.items()})
    save_file(model.state_dict(), folder / "model.safetensors")
    save_config_for_hf(model, folder / "config.json")
    return model


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_features(depth: int, data_folder: Path, tmp_path: Path, measured: Measured) -> None:
    theirs = saved(f"resnet{depth}", tmp_path)
    network = read_network(tmp_path / "model.safetensors")
    assert network.pixels_stated
    assert not network.has_heads
    assert network.model.resnet == ResNetConfig(depth=depth)  # type: ignore[arg-type]
    image = real.image(data_folder, real.IMAGES[0], 203)  # odd sides
    mean, std = (torch.tensor(PIXELS[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
        maps = theirs.forward_intermediates(
            ((pixels - mean) / std)[None], indices=[1, 2, 3, 4], intermediates_only=True
        )
    ours = ResNet(network.model.resnet)
    variables = {kind: tree["resnet"] for kind, tree in network.variables().items()}
    canvas = normalise(image[None], np.array([image.shape[:2]], np.int32), network.model)
    found = jax.jit(ours.apply)(variables, canvas)
    for level, expected in zip(("c2", "c3", "c4", "c5"), maps, strict=True):
        error = relative_error(np.asarray(found[level]), expected.numpy().transpose(0, 2, 3, 1))
        measured(f"timm: {level.upper()}", f"resnet{depth}", error, RELATIVE)


# Of sides of 32: timm's convolutions leave out the rest.
def cut(image: np.ndarray) -> np.ndarray:
    return image[: image.shape[0] // 32 * 32, : image.shape[1] // 32 * 32]


@pytest.mark.parametrize("name", ["convnext_tiny", "convnext_nano"])
def test_features_of_a_convnext(
    name: str, data_folder: Path, tmp_path: Path, measured: Measured
) -> None:
    """The second has convolutions of one tap where the first has fully connected layers."""
    theirs = saved(name, tmp_path)
    network = read_network(tmp_path / "model.safetensors")
    assert network.pixels_stated
    assert network.name == ("convnext_tiny" if name == "convnext_tiny" else "convnext")
    image = cut(real.image(data_folder, real.IMAGES[0], 203))
    mean, std = (torch.tensor(PIXELS[kind])[:, None, None] for kind in ("mean", "std"))
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
        maps = theirs.forward_intermediates(
            ((pixels - mean) / std)[None], indices=[0, 1, 2, 3], intermediates_only=True
        )
    found = convnext_stages(network, image)
    for number, expected in enumerate(maps, start=1):
        ours = found[f"stage{number}"]
        error = relative_error(ours, expected.numpy().transpose(0, 2, 3, 1))
        measured(f"timm: ConvNeXt's stage {number}", name, error, RELATIVE)


def test_the_authors_names_are_those_that_timm_reads(tmp_path: Path, measured: Measured) -> None:
    """timm turns a file of theirs into its own names; both forms give its features."""
    shapes, seed = state_dicts.convnext_authors(), 1
    tensors = {
        name: torch.from_numpy(values)
        for name, values in seeded.seeded_tensors(shapes, seed=seed).items()
    }
    depths, dims = state_dicts.CONVNEXT.values()
    model = timm.models.convnext.ConvNeXt(depths=depths, dims=dims, num_classes=5).eval()
    model.load_state_dict(timm.models.convnext.checkpoint_filter_fn({"model": tensors}, model))
    save_file(tensors, tmp_path / "authors.safetensors")
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    image = np.random.default_rng(2).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    for file in ("authors", "timm"):
        network = read_network(tmp_path / f"{file}.safetensors")
        pixels = normalise(image[None], np.array([(64, 96)], np.int32), network.model)
        with torch.no_grad():
            maps = model.forward_intermediates(
                torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2),
                indices=[0, 1, 2, 3],
                intermediates_only=True,
            )
        found = convnext_stages(network, image)
        for number, expected in enumerate(maps, start=1):
            ours = found[f"stage{number}"]
            error = relative_error(ours, expected.numpy().transpose(0, 2, 3, 1))
            measured(f"timm: ConvNeXt's stage {number}", f"names of {file}", error, RELATIVE)


def test_other_networks_with_the_tensors_of_a_convnext(tmp_path: Path) -> None:
    """Of all that timm makes by its ConvNeXt class, what is read computes the same.

    Those of another epsilon are refused, among them the tiny ones for timm's own tests.
    """
    read, refused, values = set(), set(), torch.linspace(-4, 4, 100)
    for name in timm.list_models(module="convnext"):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        # Of large ones only their names and shapes are looked at.
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        try:
            family = family_of(tensors, name)
            assigned = assign(tensors, family.rules, family.left_out, name)
            sizes = convnext_families.sizes(assigned, tensors, name)
            template = jax.eval_shape(
                lambda sizes=sizes: ConvNeXt(sizes).init(
                    jax.random.key(0), jax.numpy.zeros((1, 64, 64, 3))
                )
            )
            params = convnext_families.without_norms(template["params"])
            fill({"params": {"convnext": params}}, assigned, tensors, name)
        except ConfigError:
            refused.add(name)
            continue
        read.add(name)
        modules = list(model.modules())
        norms = [m for m in modules if isinstance(m, torch.nn.LayerNorm)]
        assert norms
        assert {norm.eps for norm in norms} == {1e-6}
        blocks = [m for m in modules if isinstance(m, timm.models.convnext.ConvNeXtBlock)]
        for block in blocks:
            assert torch.equal(block.mlp.act(values), torch.nn.functional.gelu(values))
    assert {"convnext_tiny", "convnext_small", "convnext_base", "convnext_large"} <= read
    assert all(
        re.match("convnextv2|.*_(ols|rms)$|convnext_xxlarge|test_convnext", name)
        for name in refused
    )


def test_other_networks_with_the_tensors_of_a_resnet(tmp_path: Path) -> None:
    """Of all that timm makes by its ResNet class, they are known by their name alone."""

    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            tensors = timm.create_model(name, num_classes=0).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    plain = [name for name in timm.list_models(module="resnet") if re.fullmatch(r"resnet\d+", name)]
    known = [shapes(name) for name in plain if int(name.removeprefix("resnet")) in RESNET_BLOCKS]
    alike = {name for name in timm.list_models(module="resnet") if shapes(name) in known}
    others = alike - set(plain)
    assert len(known) == len(RESNET_BLOCKS) - 1  # all but our ResNet-10
    assert others == {"resnetaa50", "resnetblur18", "resnetblur50"}
    for name in others:
        saved(name, tmp_path)
        with pytest.raises(ConfigError, match=rf"config\.json: architecture: {name}: the tensors"):
            read_network(tmp_path / "model.safetensors")
