"""timm's ResNets, saved as on its hub: their features, and those that only look like ResNets."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from parity import real, seeded
from parity.compare import RELATIVE, Measured, relative_error

pytest.importorskip("timm")
import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.model import ResNetConfig
from mrcnn_jax.models.mask_rcnn import normalise
from mrcnn_jax.models.resnet import DEPTHS, ResNet
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


def test_other_networks_with_the_tensors_of_a_resnet(tmp_path: Path) -> None:
    """Of all that timm makes by its ResNet class, they are known by their name alone."""

    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            tensors = timm.create_model(name, num_classes=0).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    plain = [name for name in timm.list_models(module="resnet") if re.fullmatch(r"resnet\d+", name)]
    known = [shapes(name) for name in plain if int(name.removeprefix("resnet")) in DEPTHS]
    alike = {name for name in timm.list_models(module="resnet") if shapes(name) in known}
    others = alike - set(plain)
    assert len(known) == len(DEPTHS) - 1  # all but our ResNet-10
    assert others == {"resnetaa50", "resnetblur18", "resnetblur50"}
    for name in others:
        saved(name, tmp_path)
        with pytest.raises(ConfigError, match=rf"config\.json: architecture: {name}: the tensors"):
            read_network(tmp_path / "model.safetensors")
