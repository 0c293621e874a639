"""torchvision's ConvNeXt, saved as its files are, and its features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parity import seeded
from parity.compare import RELATIVE, Measured, relative_error
from parity.ours import convnext_stages

pytest.importorskip("torchvision")
import torch
from torchvision.models import convnext_tiny

from mrcnn_jax.models.mask_rcnn import normalise
from mrcnn_jax.weights.network import read_network


def test_features_of_torchvisions_convnext(tmp_path: Path, measured: Measured) -> None:
    model = convnext_tiny(weights=None).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = seeded.seeded_tensors(shapes, seed=0)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in tensors.items()})
    torch.save(model.state_dict(), tmp_path / "convnext_tiny.pth")
    network = read_network(tmp_path / "convnext_tiny.pth")
    assert network.title == "convnext_tiny (torchvision)"
    image = np.random.default_rng(3).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    pixels = normalise(image[None], np.array([(64, 96)], np.int32), network.model)
    found = convnext_stages(network, image)
    x = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
    with torch.no_grad():
        for number in range(1, 5):
            x = model.features[2 * number - 1](model.features[2 * number - 2](x))
            ours = found[f"stage{number}"]
            error = relative_error(ours, x.numpy().transpose(0, 2, 3, 1))
            measured(f"torchvision: ConvNeXt's stage {number}", "convnext_tiny", error, RELATIVE)
