"""Rows that go on with a stage, and canvases for the sides of images."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import tiny

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import config_hash, differences
from mrcnn_jax.config.schema import DataConfig, ParamGroup, StageConfig
from mrcnn_jax.config.tables import (
    ADAM,
    MASK_IOU,
    canvases_for,
    extended,
    joint,
    staged,
    with_depth,
    with_mask_iou,
    with_mask_iou_head,
)


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


def matching(stage: StageConfig, path: str) -> list[str]:
    return [pattern for pattern in stage.patterns if re.fullmatch(pattern, path)]


@pytest.mark.parametrize("backbone", ["fpn", "c4"])
def test_the_mask_iou_head_has_a_row_after_the_masks(backbone: Any) -> None:
    """In which it alone is trained, with the optimiser of the masks, or another; then others."""
    table = with_depth(staged(pretrained=True, backbone=backbone, epochs=(4, 3, 2)), epochs=7)
    found = with_mask_iou(table)
    assert [stage.name for stage in found] == ["rpn", "box", "mask", "mask_iou", "depth"]
    own = found[3]
    assert (own.losses, own.train) == (("mask_iou",), (ParamGroup(MASK_IOU),))
    assert (own.epochs, own.optimizer) == (2, table[2].optimizer)
    for stage in found:
        assert matching(stage, "mask_iou_head/fc1/kernel") == [MASK_IOU]
        for path in ("resnet/a", "rpn/a", "box_head/a", "mask_head/a", "depth_head/a"):
            assert len(matching(stage, path)) == 1, (stage.name, path)
    others = [replace(stage, frozen=stage.frozen[:-1]) for stage in found if stage is not own]
    assert tuple(others) == table
    other = with_mask_iou(table, epochs=9, optimizer=ADAM)[3]
    assert other == replace(own, epochs=9, optimizer=ADAM)


def test_a_row_of_all_heads_trains_the_mask_iou_head_too() -> None:
    plain = joint(train=(ParamGroup("rpn/.*"),), frozen=("resnet/.*",), epochs=1)
    (found,) = with_mask_iou(plain)
    assert found.losses == ("rpn", "box", "mask", "mask_iou")
    assert found.train == (ParamGroup("rpn/.*"), ParamGroup(MASK_IOU))
    assert found.frozen == plain[0].frozen
    everything = joint(train=(ParamGroup(".*"),), epochs=1)
    (found,) = with_mask_iou(everything)  # a pattern may match it already
    assert found == replace(everything[0], losses=(*everything[0].losses, "mask_iou"))
    only_boxes = staged(pretrained=True)[:2]
    assert [stage.losses for stage in with_mask_iou(only_boxes)] == [("rpn",), ("box",)]


def test_a_config_with_the_head_is_trained_and_stays() -> None:
    found = with_mask_iou_head(tiny.get_config())
    assert found.model.mask_iou_head.enabled
    assert [stage.name for stage in found.stages] == ["rpn", "box", "mask", "mask_iou"]
    assert with_mask_iou_head(found) == found


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
