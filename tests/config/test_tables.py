"""Rows that go on with a stage, and canvases for the sides of images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import config_hash, differences
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.config.tables import canvases_for, extended, staged


def test_a_table_goes_on_with_its_last_stage() -> None:
    """The added row differs in name and epochs alone; rows that were added before count too."""
    config = tiny.get_config()
    table = [(stage.name, stage.epochs) for stage in config.stages]
    once = extended(config, 3)
    twice = extended(once, 10)
    assert [(stage.name, stage.epochs) for stage in twice.stages] == [
        *table,
        ("mask_2", 2),
        ("mask_3", 7),
    ]
    assert replace(twice.stages[4], name="mask", epochs=1) == config.stages[2]
    assert replace(twice, stages=config.stages) == config
    for there, epochs, trained in ((config, 1, 1), (config, 0, 1), (twice, 10, 10)):
        line = rf"--epochs {epochs}: stage mask has {trained} already$"
        with pytest.raises(ConfigError, match=line):
            extended(there, epochs)


def test_a_stage_that_ended_in_a_part_of_an_epoch_goes_on() -> None:
    config = tiny.get_config()
    rpn, box, mask = config.stages
    part = replace(config, stages=(rpn, box, replace(mask, epochs=7.4824)))
    assert extended(part, 10).stages[-1].epochs == 2.5176  # not 2.5175999999999998
    assert extended(part, 8.9824).stages[-1].epochs == 1.5
    with pytest.raises(ConfigError, match=r"^--epochs 7: stage mask has 7.4824 already$"):
        extended(part, 7)


def test_a_name_that_is_taken_is_left() -> None:
    config = tiny.get_config()
    rpn, box, mask = config.stages
    other = replace(config, stages=(replace(rpn, name="mask_2"), box, mask))
    assert extended(other, 2).stages[-1].name == "mask_3"


def test_added_rows_are_the_same_run() -> None:
    """One way only, and not where nothing was trained: an import has no table."""
    config = tiny.get_config()
    longer = extended(config, 3)
    assert differences(config, longer) == []
    assert config_hash(config) != config_hash(longer)
    assert "stages.length: 4 -> 3" in differences(longer, config)
    assert differences(config, replace(longer, seed=1)) == ["seed: 0 -> 1"]
    other = replace(longer, stages=(config.stages[0], *longer.stages[2:]))
    assert "stages.1.name: 'box' -> 'mask'" in differences(config, other)
    assert differences(replace(config, stages=()), config) == ["stages.length: 0 -> 3"]


@pytest.mark.parametrize(
    ("sides", "canvases"),
    [
        ((800, 1333), ((800, 1344), (1344, 800))),
        ((96, 160), ((96, 160), (160, 96))),
        ((1, 33), ((32, 64), (64, 32))),
        ((500, 512), ((512, 512),)),
    ],
)
def test_canvases_hold_images_lying_and_upright(
    sides: tuple[int, int], canvases: tuple[tuple[int, int], ...]
) -> None:
    assert canvases_for(*sides) == canvases
    DataConfig(short_side=sides[0], long_side=sides[1], canvases=canvases)  # which refuses smaller


def test_stages_name_the_trunk() -> None:
    """And nothing else differs."""
    for pretrained in (False, True):
        table, other = (
            repr(staged(pretrained=pretrained, trunk=trunk)) for trunk in ("resnet", "convnext")
        )
        assert other == table.replace("resnet/", "convnext/")
        assert "convnext/" in other
