"""Which recipe follows from the device and the weights, and what it takes from them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mrcnn_jax.config.model import ConvNeXtConfig, ModelConfig
from mrcnn_jax.config.tables import TORCHVISION
from mrcnn_jax.training.batch import Device
from mrcnn_jax.training.recipes import Start, recipe_for
from mrcnn_jax.training.wishes import Wishes

FROM = Wishes(init_from="weights")
WHOLE = Start(TORCHVISION, ("ape",))
LIVE = Start(replace(TORCHVISION, resnet=replace(TORCHVISION.resnet, norm="live")), ("ape",))
SMALL = ConvNeXtConfig(blocks=(1, 2, 3, 4), channels=(8, 16, 24, 32))


@pytest.mark.parametrize(
    ("device", "wishes", "start", "name"),
    [
        ("cpu", Wishes(), None, "scratch"),
        ("gpu", Wishes(), None, "scratch"),
        ("cpu", FROM, None, "finetune_cpu"),
        ("gpu", FROM, None, "finetune"),
        ("cpu", FROM, WHOLE, "finetune"),
    ],
)
def test_the_device_and_the_weights_decide(
    device: Device, wishes: Wishes, start: Start | None, name: str
) -> None:
    assert recipe_for(device, wishes, start, None).name == name


def test_sizes_are_those_of_the_trunk_in_the_file() -> None:
    trunk = ModelConfig(resnet=replace(TORCHVISION.resnet, depth=18))
    recipe = recipe_for("cpu", FROM, None, trunk)
    assert (recipe.model.resnet.depth, recipe.model.fpn_channels) == (18, 128)
    recipe = recipe_for("cpu", FROM, None, ModelConfig(trunk="convnext", convnext=SMALL))
    assert recipe.model.trunk == "convnext"
    assert recipe.model.convnext.channels == SMALL.channels
    assert recipe.stages[0].train[0].pattern == "convnext/(stage[4]|norm[2345])/.*"
    assert recipe.stages[0].frozen == ("convnext/(stem|stage[123])/.*",)


def test_live_norm_is_trained_as_a_whole() -> None:
    assert recipe_for("gpu", FROM, LIVE, None).stages[0].train[0].pattern == "resnet/.*"
    assert recipe_for("gpu", FROM, WHOLE, None).stages[0].frozen


def test_outputs_per_class_fit_classes_of_their_number_and_names() -> None:
    two = replace(TORCHVISION, num_classes=2)
    assert Start(two, ("ape", "bee")).fits(("ape", "bee"))
    assert Start(two, ()).fits(("ape", "bee"))
    assert not Start(two, ("ape", "bee")).fits(("bee", "ape"))
    assert not Start(two, ()).fits(("ape",))
