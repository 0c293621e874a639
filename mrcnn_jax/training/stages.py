"""A stage as a row of a table: its patterns give labels, trainable subtree and live batch norms.

A parameter's path is its nested names joined by "/", for example
"resnet/layer1/block0/conv1/kernel". A pattern of a stage matches a path as a whole
(`re.fullmatch`), and every path matches exactly one pattern: nothing is trained or frozen by
accident.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import BOX_LOSSES, Config, Loss, StageConfig
from mrcnn_jax.models.cascade import BOX_HEADS
from mrcnn_jax.models.mask_rcnn import modules_of
from mrcnn_jax.output import text_table
from mrcnn_jax.structures import Params

# Heads, and the loss that trains each. Those that every network has may be trained without it once
# they know something.
_NEEDED: dict[str, Loss] = {"rpn": "rpn", "box_head": "box", "mask_head": "mask"}
_OWN_LOSSES: dict[str, Loss] = {
    **_NEEDED,
    **dict(zip(BOX_HEADS[1:], BOX_LOSSES[1:], strict=True)),
    "mask_iou_head": "mask_iou",
    "depth_head": "depth",
}
FROZEN = "frozen"  # label of leaves that are not trained; the others are "group0", "group1", ...


def labels(stage: StageConfig, params: Params) -> dict[str, Any]:
    """The label of every parameter, in a tree like `params`, of which only the names are read.

    Raises:
        ConfigError: a pattern that matches nothing, a parameter that no pattern or more than one
            matches; the line names stage, pattern and parameter.
    """
    patterns = _patterns(stage)
    paths = list(flatten_dict(params, sep="/"))
    # Patterns first: a misspelt pattern also leaves its parameters unmatched, and the pattern must
    # be corrected.
    for _, pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            modules = ", ".join(sorted({path.split("/")[0] for path in paths}))
            raise ConfigError(
                f"stages.{stage.name}: pattern {pattern!r} matches no parameter "
                f"(modules: {modules})"
            )
    flat = {}
    for path in paths:
        matching = [(label, pattern) for label, pattern in patterns if re.fullmatch(pattern, path)]
        if not matching:
            raise ConfigError(
                f"stages.{stage.name}: parameter {path} matches no pattern of train or frozen"
            )
        if len(matching) > 1:
            both = " and ".join(repr(pattern) for _, pattern in matching)
            raise ConfigError(
                f"stages.{stage.name}: parameter {path} matches {both}; "
                "exactly one pattern may match"
            )
        flat[path] = matching[0][0]
    return unflatten_dict(flat, sep="/")


def split(tree: Params, labels: dict[str, Any]) -> tuple[Params, Params]:
    """(trainable, frozen): nested dicts, each with its own leaves of `tree` only."""
    flat, kinds = flatten_dict(tree, sep="/"), flatten_dict(labels, sep="/")
    trainable = {path: leaf for path, leaf in flat.items() if kinds[path] != FROZEN}
    frozen = {path: leaf for path, leaf in flat.items() if kinds[path] == FROZEN}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def merge(trainable: Params, frozen: Params) -> Params:
    """The inverse of `split`; the leaves are the same arrays."""
    return unflatten_dict(flatten_dict(trainable, sep="/") | flatten_dict(frozen, sep="/"), sep="/")


def trained(stage: StageConfig, params: Params) -> Params:
    """The subtree of `params` that the stage trains; ConfigError as of `labels`."""
    return split(params, labels(stage, params))[0]


def trained_modules(stage: StageConfig, params: Params) -> frozenset[str]:
    """Top-level modules ("resnet", "rpn", ...) with a trainable parameter.

    The batch statistics of no other module may move.
    """
    return frozenset(trained(stage, params))


def live_modules(model: ModelConfig) -> frozenset[str]:
    """Modules with batch norm by the statistics of the batch, where a stage trains them."""
    trunk = {"resnet", *(("res5",) if model.backbone == "c4" else ())} if model.live_norm else set()
    return frozenset(trunk | ({"rpn"} if model.rpn.batch_norm else set()))


def refuse_partly_live(stage: StageConfig, params: Params, live: Collection[str]) -> None:
    """Raises ConfigError if a module of `live`, normalised by batch statistics, is trained in part.

    The statistics of its frozen layers would move. Or if it is res5 of a C4 network, and masks are
    trained, which read its running statistics.
    """
    kinds = labels(stage, params)
    for module in live:
        frozen = {kind == FROZEN for kind in flatten_dict(kinds[module]).values()}
        if module == "res5" and False in frozen and {"mask", "mask_iou"} & set(stage.losses):
            raise ConfigError(
                f"stages.{stage.name}: trains masks and res5 with live batch norm, which sees the "
                "boxes of the box head alone (model.resnet.norm frozen, or freeze res5)"
            )
        if len(frozen) == 2:
            raise ConfigError(
                f"stages.{stage.name}: {module} has live batch norm and is trained in part; "
                "train or freeze all of it"
            )


def loaded_modules(params: Params, loaded: Params) -> frozenset[str]:
    """Top-level modules of `params` of which `loaded`, some of its leaves, holds all."""
    random = flatten_dict(params).keys() - flatten_dict(loaded).keys()
    return frozenset(params.keys() - {path[0] for path in random})


def refuse_random_frozen(
    config: Config, params: Params, learnt: Collection[str], loaded: Params | None = None
) -> None:
    """Raises ConfigError if a stage trains on top of a frozen module with random weights, or of
    frozen kernels of a random module that it trains in part (of a trunk they may be).

    Or if it trains a head without its loss: a further head of a cascade, the mask-IoU head or the
    depth head, or any other that is random and that the stage's losses read.

    Args:
        config: its stages, each of which adds what it trains to `learnt` for the next.
        params: of its network; only names and shapes are read.
        learnt: modules that do not start at random.
        loaded: leaves that do not, also of other modules; None: unknown, and modules that are
            frozen in part are let pass.
    """
    learnt = set(learnt)
    for stage in config.stages:
        heads = trained_modules(stage, params)
        needed = set().union(*(modules_of(loss, config.model) for loss in stage.losses))
        for module, loss in _OWN_LOSSES.items():
            learns = module not in _NEEDED or module in needed - learnt
            if module in heads and learns and loss not in stage.losses:
                raise ConfigError(
                    f"stages.{stage.name}: trains {module} without its loss, {loss} (add the loss, "
                    "or freeze the module)"
                )
        kept: set[str] = set()
        if loaded is not None:
            kept = _frozen_kernels(stage, params, loaded) - {config.model.trunk, "res5"}
        random = ", ".join(
            name if name not in heads else f"{name} in part"
            for name in sorted(((needed - heads) | (needed & kept)) - learnt)
        )
        if random:
            raise ConfigError(
                f"stages.{stage.name}: frozen at random initialisation: {random} "
                "(train it before, or load it: --weights)"
            )
        learnt |= needed  # what a loss reads: trained here, or learnt before


def _frozen_kernels(stage: StageConfig, params: Params, loaded: Params) -> set[str]:
    """Modules of which a stage freezes a kernel that was not loaded; scales and biases do not begin
    at random."""
    kinds = flatten_dict(labels(stage, params))
    leaves = {path: leaf for path, leaf in flatten_dict(params).items() if leaf.ndim > 1}
    random = leaves.keys() - flatten_dict(loaded).keys()
    return {path[0] for path in random if kinds[path] == FROZEN}


def summary(stage: StageConfig, params: Params, *, warmup: int) -> str:
    """A table to print: leaves, parameters and learning rate of each pattern of a stage.

    Args:
        warmup: updates of its warm-up.
    """
    labels(stage, params)  # a parameter must not be counted twice
    sizes = {path: leaf.size for path, leaf in flatten_dict(params, sep="/").items()}
    optimizer = stage.optimizer
    scales = [group.lr_scale for group in stage.train]
    rows = [("", "pattern", "leaves", "parameters", "learning rate")]
    count = 0
    for i, (label, pattern) in enumerate(_patterns(stage)):
        matching = [size for path, size in sizes.items() if re.fullmatch(pattern, path)]
        if label != FROZEN:
            count += sum(matching)
        rate = "-" if label == FROZEN else f"{optimizer.learning_rate * scales[i]:g}"
        rows.append((label, pattern, f"{len(matching):,}", f"{sum(matching):,}", rate))
    head = (
        f"stage {stage.name}: losses {', '.join(stage.losses)}; {stage.epochs:g} epochs; "
        f"{optimizer.name}, {optimizer.schedule} rate, warm-up {warmup} updates, "
        f"weight decay {optimizer.weight_decay:g}"
    )
    if optimizer.clip_norm is not None:
        head += f", clip norm {optimizer.clip_norm:g}"
    if stage.ema_decay:
        head += f", moving average {stage.ema_decay:g}"
    if optimizer.accumulate_steps > 1:
        head += f", an update every {optimizer.accumulate_steps} steps"
    foot = f"trained {count:,} parameters, frozen {sum(sizes.values()) - count:,}"
    return "\n".join((head, *(f"  {line}" for line in text_table(rows, left=2)), f"  {foot}"))


def _patterns(stage: StageConfig) -> list[tuple[str, str]]:
    """(label, pattern) of every pattern, trained ones first."""
    groups = [(f"group{i}", group.pattern) for i, group in enumerate(stage.train)]
    return groups + [(FROZEN, pattern) for pattern in stage.frozen]
