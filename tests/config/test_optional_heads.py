"""Stage tables of networks with a cascade of box heads, a mask-IoU head, and a depth head."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import tiny

from mrcnn_jax.config.heads import DepthHeadConfig, MaskIoUHeadConfig
from mrcnn_jax.config.optional_heads import (
    MASK_IOU,
    following_heads,
    with_cascade,
    with_depth,
    with_mask_iou,
)
from mrcnn_jax.config.schema import ParamGroup, StageConfig
from mrcnn_jax.config.tables import joint, staged


def test_each_head_of_a_cascade_is_a_row() -> None:
    """By hand: what each row trains, and what it freezes besides."""
    table = staged(pretrained=True, epochs=(1, 2, 3))
    trunk, further = {"resnet/.*", "fpn/.*", "rpn/.*"}, {"box_head2/.*", "box_head3/.*"}
    assert {
        row.name: (row.losses, {group.pattern for group in row.train}, set(row.frozen), row.epochs)
        for row in with_cascade(table, 2)
    } == {
        "rpn": (
            ("rpn",),
            {"fpn/.*", "rpn/.*"},
            {"resnet/.*", "box_head/.*", "mask_head/.*"} | further,
            1,
        ),
        "box": (("box",), {"box_head/.*"}, trunk | {"mask_head/.*"} | further, 2),
        "box2": (
            ("box2",),
            {"box_head2/.*"},
            trunk | {"mask_head/.*", "box_head/.*", "box_head3/.*"},
            2,
        ),
        "box3": (
            ("box3",),
            {"box_head3/.*"},
            trunk | {"mask_head/.*", "box_head/.*", "box_head2/.*"},
            2,
        ),
        "mask": (("mask",), {"mask_head/.*"}, trunk | {"box_head/.*"} | further, 3),
    }
    assert [row.name for row in with_cascade(table, 1)] == ["rpn", "box", "box2", "mask"]


def test_each_head_of_a_cascade_is_trained_in_part_where_the_first_is() -> None:
    (row,) = staged(pretrained=True)[1:2]
    train = (ParamGroup("box_head/(logits|deltas)/.*"),)
    row = replace(row, train=train, frozen=(*row.frozen, "box_head/fc.*"))
    for stage in with_cascade((row,), 2):
        for head in ("box_head", "box_head2", "box_head3"):
            for layer in ("fc1", "logits"):
                assert len(matching(stage, f"{head}/{layer}/kernel")) == 1, (stage.name, head)
        assert [group.pattern for group in stage.train] == [
            f"{stage.losses[0].replace('box', 'box_head')}/(logits|deltas)/.*"
        ]


def test_a_joint_table_trains_all_heads_of_a_cascade() -> None:
    train = (ParamGroup("fpn/.*"), ParamGroup("box_head/fc.*", 0.1), ParamGroup("mask_head/.*"))
    (row,) = with_cascade(joint(train, ("resnet/.*", "box_head/[ld].*"), epochs=1), 2)
    assert row.losses == ("rpn", "box", "box2", "box3", "mask")
    assert row.train == (
        *train,
        ParamGroup("box_head2/fc.*", 0.1),
        ParamGroup("box_head3/fc.*", 0.1),
    )
    assert set(row.frozen) == {
        "resnet/.*",
        "box_head/[ld].*",
        "box_head2/[ld].*",
        "box_head3/[ld].*",
    }


def test_a_table_follows_the_cascade_once() -> None:
    config = tiny.get_config()
    assert following_heads(config) == config
    box_head = replace(config.model.box_head, class_agnostic=True, cascade=(0.6,))
    config = replace(config, model=replace(config.model, box_head=box_head))
    followed = following_heads(config)
    assert [row.name for row in followed.stages] == ["rpn", "box", "box2", "mask"]
    assert following_heads(followed) == followed


def matching(stage: StageConfig, path: str) -> list[str]:
    return [pattern for pattern in stage.patterns if re.fullmatch(pattern, path)]


@pytest.mark.parametrize("backbone", ["fpn", "c4"])
def test_the_mask_iou_head_has_a_row_after_the_masks(backbone: Any) -> None:
    """In which it alone is trained, with the optimiser of the masks; then others."""
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


def test_a_table_follows_the_head_once() -> None:
    config = tiny.get_config()
    head = MaskIoUHeadConfig(enabled=True)
    found = following_heads(replace(config, model=replace(config.model, mask_iou_head=head)))
    assert [stage.name for stage in found.stages] == ["rpn", "box", "mask", "mask_iou"]
    assert following_heads(found) == found
    frozen = tuple(replace(stage, frozen=(*stage.frozen, MASK_IOU)) for stage in config.stages)
    known = replace(found, stages=frozen)  # its weights come from another run
    assert following_heads(known) == known


def test_a_depth_head_gets_a_row_of_its_own() -> None:
    config = tiny.get_config()
    config = replace(config, model=replace(config.model, depth_head=DepthHeadConfig("dense")))
    found = following_heads(config)
    assert [stage.losses for stage in found.stages] == [("rpn",), ("box",), ("mask",), ("depth",)]
    last = config.stages[-1]
    assert found.stages == with_depth(config.stages, epochs=last.epochs, optimizer=last.optimizer)
    assert following_heads(found) == found
    # Named or matched by a row already, if only to be frozen.
    for pattern in ("depth_head/.*", "(?!rpn/).*"):
        named = (replace(config.stages[0], frozen=(pattern,)),)
        assert following_heads(replace(config, stages=named)).stages == named


@pytest.mark.parametrize("pattern", [".*", "box_head.*", "box_head[23]?/.*", "box_head/.*"])
def test_a_table_that_has_the_losses_stays(pattern: str) -> None:
    """As it is read from the config.json of a run, however its patterns are written."""
    config = tiny.get_config()
    box_head = replace(config.model.box_head, class_agnostic=True, cascade=(0.6, 0.7))
    config = replace(
        config,
        model=replace(config.model, box_head=box_head, mask_iou_head=MaskIoUHeadConfig(True)),
        stages=joint((ParamGroup(pattern),), epochs=1),
    )
    found = following_heads(config)
    assert found.stages[0].losses == ("rpn", "box", "box2", "box3", "mask", "mask_iou")
    assert following_heads(found) == found


def test_a_table_gets_what_it_lacks_beside_what_it_names() -> None:
    """Losses or patterns alone make the table that neither of them makes."""
    config = tiny.get_config()
    box_head = replace(config.model.box_head, class_agnostic=True, cascade=(0.6, 0.7))
    model = replace(config.model, box_head=box_head, mask_iou_head=MaskIoUHeadConfig(True))
    trained = tuple(ParamGroup(f"{head}/.*") for head in ("rpn", "box_head", "mask_head"))
    table = joint(trained, ("resnet/.*",), epochs=1)
    found = following_heads(replace(config, model=model, stages=table))
    (row,) = found.stages
    assert [group.pattern for group in row.train] == [
        "rpn/.*",
        "box_head/.*",
        "mask_head/.*",
        "box_head2/.*",
        "box_head3/.*",
        MASK_IOU,
    ]
    for losses, train in ((row.losses, trained), (table[0].losses, row.train)):
        part = replace(found, stages=(replace(row, losses=losses, train=train),))
        assert following_heads(part) == found
    covered = (*trained, ParamGroup("box_head[23]/.*"))
    stays = replace(found, stages=(replace(row, train=(*covered, ParamGroup(MASK_IOU))),))
    assert following_heads(stays) == stays
    frozen = ("resnet/.*", "box_head[23]/.*", MASK_IOU)
    apart = (ParamGroup("(?!resnet/|box_head2/|box_head3/|mask_iou_head/).*"),)
    for train in (trained, apart):
        stays = replace(found, stages=joint(train, frozen, epochs=1))
        assert following_heads(stays) == stays


def test_each_row_is_completed_for_itself() -> None:
    """A wide pattern in one row covers nothing in another one."""
    table = (*staged(pretrained=True), *joint((ParamGroup(".*"),), epochs=1))
    found = with_cascade(table, 2)
    assert [row.name for row in found] == ["rpn", "box", "box2", "box3", "mask", "joint"]
    assert found[-1].losses == ("rpn", "box", "box2", "box3", "mask")
    for row in found:
        for path in ("resnet/a", "box_head/logits/kernel", "box_head2/logits/kernel"):
            assert len(matching(row, path)) == 1, (row.name, path)
    assert with_cascade(found, 2) == found


def test_the_row_of_a_mask_iou_head_keeps_out_of_wide_patterns() -> None:
    *_, masks = staged(pretrained=True)
    table = with_mask_iou((replace(masks, frozen=("(?!mask_head/).*",)),))
    for stage, trains in zip(table, (False, True), strict=True):
        paths = ("resnet/a", "mask_head/a", "mask_iou_head/ious/kernel", "box_head/a")
        assert [len(matching(stage, path)) for path in paths] == [1] * 4
        assert any(group.pattern == MASK_IOU for group in stage.train) == trains


def test_a_table_follows_both_heads() -> None:
    """Each parameter of the network, and no other, matches exactly one pattern of each row."""
    config = tiny.get_config()
    box_head = replace(config.model.box_head, class_agnostic=True, cascade=(0.6, 0.7))
    head = MaskIoUHeadConfig(enabled=True)
    model = replace(config.model, box_head=box_head, mask_iou_head=head)
    found = following_heads(replace(config, model=model)).stages
    names = ["rpn", "box", "box2", "box3", "mask", "mask_iou"]
    assert [stage.name for stage in found] == names
    heads = ("rpn", "box_head", "box_head2", "box_head3", "mask_head", "mask_iou_head")
    for stage, head_name in zip(found, heads, strict=True):
        trained = [group.pattern for group in stage.train]
        for path in ("resnet/a", "fpn/a", *(f"{name}/a/kernel" for name in heads)):
            assert len(matching(stage, path)) == 1, (stage.name, path)
        assert any(re.fullmatch(pattern, f"{head_name}/a/kernel") for pattern in trained)
