"""Heads that a network need not have, added to a stage table made for one without them.

The depth head, the further box heads of a cascade, and the head of Mask Scoring.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable

from mrcnn_jax.config.schema import (
    BOX_LOSSES,
    Config,
    OptimizerConfig,
    ParamGroup,
    StageConfig,
)
from mrcnn_jax.config.tables import ADAM

MASK_IOU = "mask_iou_head/.*"  # the pattern of the mask-IoU head
_PROBE = "mask_iou_head/ious/kernel"  # one of its parameters
_BOX2_PROBE = "box_head2/logits/kernel"
_DEPTH_PROBE = "depth_head/log_depth/kernel"


def with_depth(
    table: tuple[StageConfig, ...],
    *,
    epochs: float = 20,
    optimizer: OptimizerConfig = ADAM,
    together: bool = False,
) -> tuple[StageConfig, ...]:
    """Adds a stage that trains the depth head alone, so that boxes and masks stay as they are.

    Args:
        table: stages of a network without a depth head.
        epochs: passes over the training images.
        optimizer: the optimiser.
        together: the last row of `table` trains the head too, so that the features which that row
            trains learn to tell distance.
    """
    head, first = "depth_head/.*", table[0]
    others = (*(group.pattern for group in first.train), *first.frozen)
    depth = StageConfig(
        name="depth",
        losses=("depth",),
        train=(ParamGroup(head),),
        frozen=others,
        optimizer=optimizer,
        epochs=epochs,
    )
    rows = [dataclasses.replace(row, frozen=(*row.frozen, head)) for row in table]
    if together:
        last = table[-1]
        train = (*last.train, ParamGroup(head))
        rows[-1] = dataclasses.replace(last, losses=(*last.losses, "depth"), train=train)
    return (*rows, depth)


def with_cascade(table: tuple[StageConfig, ...], heads: int) -> tuple[StageConfig, ...]:
    """Adds the further box heads of a cascade (`BoxHeadConfig.cascade`) to a table.

    A row that trains the box head alone is followed by a copy for each further head, which trains
    that one alone. Any other row does with the further heads what it does with the first. A row
    that has patterns of these heads, or the table their losses, gets what is missing beside them.

    Args:
        table: stages of a network without a cascade; patterns of the box head begin with its name.
        heads: number of further heads, 1 or 2.
    """
    has_loss = any("box2" in row.losses for row in table)
    rows: list[StageConfig] = []
    for row in table:
        covered = _match(row.patterns, _BOX2_PROBE)
        if row.losses == ("box",) and not (has_loss or covered):
            rows += (_of_box_head(row, number, heads) for number in range(1 + heads))
            continue
        trains = not covered or _match((group.pattern for group in row.train), _BOX2_PROBE)
        if trains and not has_loss and row.losses != ("box",):
            losses = (
                (loss, *(BOX_LOSSES[1 : 1 + heads] if loss == "box" else ())) for loss in row.losses
            )
            row = dataclasses.replace(row, losses=tuple(itertools.chain.from_iterable(losses)))
        if not covered:
            further = (
                dataclasses.replace(group, pattern=pattern)
                for group in row.train
                for pattern in _of_further_heads(group.pattern, heads)
            )
            frozen = _with_further_heads(row.frozen, heads)
            row = dataclasses.replace(row, train=(*row.train, *further), frozen=frozen)
        rows.append(row)
    return tuple(rows)


def _of_box_head(row: StageConfig, number: int, heads: int) -> StageConfig:
    """A row for one head of a cascade, counted from 0, after that of the first."""
    trained = tuple(group.pattern for group in row.train)
    if number == 0:
        frozen = itertools.chain.from_iterable(_of_further_heads(one, heads) for one in trained)
        return dataclasses.replace(row, frozen=(*_with_further_heads(row.frozen, heads), *frozen))
    name, train = f"{row.name}{number + 1}", []
    for group in row.train:
        of_heads = _of_further_heads(group.pattern, heads)
        if of_heads:
            train.append(dataclasses.replace(group, pattern=of_heads[number - 1]))
    own = {group.pattern for group in train}
    others = (one for one in _with_further_heads((*row.frozen, *trained), heads) if one not in own)
    return dataclasses.replace(
        row, name=name, losses=(BOX_LOSSES[number],), train=tuple(train), frozen=tuple(others)
    )


def _with_further_heads(patterns: tuple[str, ...], heads: int) -> tuple[str, ...]:
    return (*patterns, *(new for one in patterns for new in _of_further_heads(one, heads)))


def _of_further_heads(pattern: str, heads: int) -> tuple[str, ...]:
    """A pattern of the box head made those of the further heads; () if it is of something else."""
    head, slash, rest = pattern.partition("/")
    if head != "box_head":
        return ()
    return tuple(f"{head}{number}{slash}{rest}" for number in range(2, 2 + heads))


def with_mask_iou(table: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
    """Adds the training of the mask-IoU head.

    A row that trains masks together with boxes (`joint`) trains it too, as in the paper. After the
    masks' row of `staged` comes another one of as many epochs, which trains it alone: masks stay as
    they are.

    Args:
        table: stages of a network without a mask-IoU head.
    """

    def without(row: StageConfig) -> StageConfig:
        covered = _match(row.patterns, _PROBE)
        return row if covered else dataclasses.replace(row, frozen=(*row.frozen, MASK_IOU))

    rows = [without(row) for row in table]
    place = max((i for i, row in enumerate(table) if "mask" in row.losses), default=None)
    if place is None:
        return tuple(rows)
    row = table[place]
    if "box" in row.losses:
        covered = without(row) == row
        rows[place] = dataclasses.replace(
            row,
            losses=(*row.losses, "mask_iou"),
            train=row.train if covered else (*row.train, ParamGroup(MASK_IOU)),
        )
        return tuple(rows)
    own = dataclasses.replace(
        row,
        name="mask_iou",
        losses=("mask_iou",),
        train=(ParamGroup(MASK_IOU),),
        frozen=tuple(map(_without_mask_iou, row.patterns)),
    )
    return (*rows[: place + 1], own, *rows[place + 1 :])


def _match(patterns: Iterable[str], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _without_mask_iou(pattern: str) -> str:
    """A pattern that may match the mask-IoU head, made one that does not."""
    if re.fullmatch(pattern, _PROBE) is None:
        return pattern
    return f"(?!mask_iou_head/)(?:{pattern})"


def following_heads(config: Config) -> Config:
    """Adds what the table lacks of the network's cascade, mask-IoU head and depth head.

    A depth head that no row names gets one of its own, as long as the last one and by its
    optimiser (`with_depth`).
    """
    model, stages = config.model, config.stages
    cascade = len(model.box_head.cascade)
    if cascade > 0:
        stages = with_cascade(stages, cascade)
    if model.mask_iou_head.enabled:
        named = any(
            "mask_iou" in row.losses or any("mask_iou_head" in one for one in row.patterns)
            for row in stages
        )
        stages = tuple(map(_with_both, stages)) if named else with_mask_iou(stages)
    if model.depth_head.kind != "none" and stages and not any(map(_has_depth, stages)):
        last = stages[-1]
        stages = with_depth(stages, epochs=last.epochs, optimizer=last.optimizer)
    return dataclasses.replace(config, stages=stages)


def _has_depth(row: StageConfig) -> bool:
    named = any("depth_head" in pattern for pattern in row.patterns)
    return "depth" in row.losses or named or _match(row.patterns, _DEPTH_PROBE)


def _with_both(row: StageConfig) -> StageConfig:
    """A row that names the mask-IoU head by its loss or its pattern, with the other one."""
    if _match((group.pattern for group in row.train), _PROBE):
        if "mask" in row.losses and "mask_iou" not in row.losses:
            return dataclasses.replace(row, losses=(*row.losses, "mask_iou"))
    elif not _match(row.patterns, _PROBE):
        if "mask_iou" in row.losses:
            return dataclasses.replace(row, train=(*row.train, ParamGroup(MASK_IOU)))
        return dataclasses.replace(row, frozen=(*row.frozen, MASK_IOU))
    return row
