"""Which recipe follows from the device and the weights, and what it takes from them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mrcnn_jax.choices.batch import Device
from mrcnn_jax.choices.recipes import Start, recipe_for
from mrcnn_jax.config.model import ConvNeXtConfig, ModelConfig
from mrcnn_jax.config.tables import TORCHVISION

WHOLE = Start(TORCHVISION, ("ape",))
LIVE = Start(replace(TORCHVISION, resnet=replace(TORCHVISION.resnet, norm="live")), ("ape",))
SMALL = ConvNeXtConfig(blocks=(1, 2, 3, 4), channels=(8, 16, 24, 32))
CONVNEXT = ModelConfig(trunk="convnext", convnext=SMALL)


@pytest.mark.parametrize(
    ("device", "init_from", "start", "name"),
    [
        ("cpu", None, None, "scratch"),
        ("gpu", None, None, "scratch"),
        ("cpu", "weights", None, "finetune_cpu"),
        ("gpu", "weights", None, "finetune"),
        ("cpu", "weights", WHOLE, "finetune"),
    ],
)
def test_the_device_and_the_weights_decide(
    device: Device, init_from: str | None, start: Start | None, name: str
) -> None:
    assert recipe_for(device, {}, init_from=init_from, start=start).name == name


def test_sizes_are_those_of_the_trunk_in_the_file() -> None:
    trunk = ModelConfig(resnet=replace(TORCHVISION.resnet, depth=18))
    recipe = recipe_for("cpu", {}, init_from="weights", trunk=trunk)
    assert (recipe.model.resnet.depth, recipe.model.fpn_channels) == (18, 128)
    recipe = recipe_for("cpu", {}, init_from="weights", trunk=CONVNEXT)
    assert recipe.model.trunk == "convnext"
    assert recipe.model.convnext.channels == SMALL.channels
    assert recipe.stages[0].train[0].pattern == "convnext/(stage[4]|norm[2345])/.*"
    assert recipe.stages[0].frozen == ("convnext/(stem|stage[123])/.*",)


def test_live_norm_is_trained_as_a_whole() -> None:
    assert (
        recipe_for("gpu", {}, init_from="weights", start=LIVE).stages[0].train[0].pattern
        == "resnet/.*"
    )
    assert recipe_for("gpu", {}, init_from="weights", start=WHOLE).stages[0].frozen


def test_outputs_per_class_fit_classes_of_their_number_and_names() -> None:
    two = replace(TORCHVISION, num_classes=2)
    assert Start(two, ("ape", "bee")).fits(("ape", "bee"))
    assert Start(two, ()).fits(("ape", "bee"))
    assert not Start(two, ("ape", "bee")).fits(("bee", "ape"))
    assert not Start(two, ()).fits(("ape",))
