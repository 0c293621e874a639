"""benchmarks/peer_recipe.py: torchvision's recipe is the one that torch and torchvision have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peer_recipe
import pytest
import torch
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.models.detection import maskrcnn_resnet50_fpn

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig

DATA = DataConfig(short_side=64, long_side=96, canvases=((64, 96), (96, 64)))


def test_the_network_is_the_constructors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with heads that are drawn anew: both draw the same, as from the same seed."""
    torch.manual_seed(5)
    state = {
        name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in resnet50().state_dict().items()
    }
    path = tmp_path / "resnet.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", lambda self, **_: dict(state))
    torch.manual_seed(0)
    theirs = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=ResNet50_Weights.IMAGENET1K_V1,
        num_classes=4,
        min_size=64,
        max_size=96,
    )
    torch.manual_seed(0)
    model = peer_recipe.build(path, classes=3, data=DATA)
    assert str(model) == str(theirs)
    found, expected = model.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    trained, needed = (
        {name for name, parameter in of.named_parameters() if parameter.requires_grad}
        for of in (model, theirs)
    )
    assert trained == needed

    np.savez(path, **{name: tensor[:1] for name, tensor in state.items() if tensor.ndim})
    with pytest.raises(ConfigError, match=r"ResNet-50: conv1\.weight differs"):
        peer_recipe.build(path, classes=3, data=DATA)


def test_rates_are_those_of_the_schedulers() -> None:
    """13 epochs of 8 steps: the reference's 26 with milestones halved, stepped as it does."""
    epoch_steps, epochs = 8, 13
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02 * 2 / 16)
    later = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[8, 11], gamma=0.1)
    first = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=epoch_steps - 1)
    for step in range(epochs * epoch_steps):
        rate = peer_recipe.learning_rate(step, step / (epochs * epoch_steps), epoch_steps)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        if step < epoch_steps:
            first.step()
        if (step + 1) % epoch_steps == 0:
            later.step()
