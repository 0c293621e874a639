"""The variants of a recipe that the experiments compare, and the runs that train them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mrcnn_jax.config import tables
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_file, resolve_paths
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.optional_heads import following_heads
from mrcnn_jax.config.schema import Config, Loss, StageConfig


def _model(part: str, **values: Any) -> Callable[[Config], Config]:
    """Other values in `config.model.<part>`."""

    def change(config: Config) -> Config:
        changed = replace(getattr(config.model, part), **values)
        return replace(config, model=replace(config.model, **{part: changed}))

    return change


def _staged(config: Config, backbone: Literal["fpn", "c4"]) -> tuple[StageConfig, ...]:
    """The three stages of `config` as `tables.staged` has them for a backbone."""
    rpn, box, mask = config.stages
    return tables.staged(
        pretrained=f"{config.model.trunk}/.*" in rpn.frozen,
        backbone=backbone,
        trunk=config.model.trunk,
        epochs=(rpn.epochs, box.epochs, mask.epochs),
        optimizers=(rpn.optimizer, box.optimizer, mask.optimizer),
    )


def _c4(config: Config) -> Config:
    return replace(config, model=tables.c4(config.model), stages=_staged(config, "c4"))


def _joint(config: Config) -> Config:
    """One stage that trains what the three train together.

    It lasts as long as the longest of them and has the optimiser of the first.
    """
    stages = config.stages
    train = tuple(group for stage in stages for group in stage.train)
    frozen = tuple(
        pattern for pattern in stages[0].frozen if all(pattern in stage.frozen for stage in stages)
    )
    epochs = max(stage.epochs for stage in stages)
    return replace(
        config, stages=tables.joint(train, frozen, epochs=epochs, optimizer=stages[0].optimizer)
    )


def _cascade(config: Config) -> Config:
    """Two further box heads with the paper's thresholds, each trained as the first one is."""
    config = _model("box_head", class_agnostic=True, cascade=(0.6, 0.7))(config)
    return following_heads(config)


def _mask_scoring(config: Config) -> Config:
    """A fourth stage, which trains the head alone: boxes and masks are the baseline's."""
    return following_heads(_model("mask_iou_head", enabled=True)(config))


@dataclass(frozen=True)
class Variant:
    """One change of the baseline."""

    experiment: str
    name: str
    change: Callable[[Config], Config]

    @property
    def title(self) -> str:
        return f"{self.experiment} {self.name}".strip()


BASELINE = Variant("baseline", "", lambda config: config)
"""FPN, RoIAlign, cross-entropy on sigmoid masks, three anchor ratios, three stages: the other side
of every experiment."""

VARIANTS = (
    BASELINE,
    Variant("backbone", "c4", _c4),
    Variant("roi_op", "pool", _model("roi", op="pool")),
    Variant("roi_op", "warp", _model("roi", op="warp")),
    Variant("mask_loss", "focal", _model("mask_head", loss="focal", focal_gamma=2.0)),
    # The default alpha, .25, is for few positives; a mask fills half of its box and more.
    Variant(
        "mask_loss",
        "focal-even",
        _model("mask_head", loss="focal", focal_gamma=2.0, focal_alpha=0.5),
    ),
    Variant("anchor_ratios", "one", _model("rpn", ratios=(1.0,))),
    Variant("mask_activation", "softmax", _model("mask_head", loss="softmax")),
    Variant("training", "joint", _joint),
    Variant("box_loss", "giou", _model("box_head", box_loss="giou")),
    Variant("boxes", "class-agnostic", _model("box_head", class_agnostic=True)),
    Variant("boxes", "cascade", _cascade),
    Variant("mask_classes", "agnostic", _model("mask_head", class_agnostic=True)),
    Variant("mask_scoring", "iou", _mask_scoring),
)
EXPERIMENTS = tuple(dict.fromkeys(variant.experiment for variant in VARIANTS))


def load_recipe(name: str, data_root: str | None = None) -> Config:
    """The baseline, with absolute paths.

    Raises:
        ConfigError: there is no such recipe, or the variants cannot be made from it.
    """
    try:
        recipe = load_config_file(name)
    except ConfigError as error:
        raise ConfigError(f"--recipe: {error}") from None
    if len(recipe.stages) != 3 or recipe.stages != _staged(recipe, "fpn"):
        raise ConfigError(
            f"--recipe: {name}: its stages must be those that tables.staged makes for an FPN"
        )
    for variant in VARIANTS:
        if variant is not BASELINE and variant.change(recipe) == recipe:
            raise ConfigError(
                f"--recipe: {name}: is the variant {variant.title}; it must be the baseline"
            )
    if data_root is not None:
        recipe = replace(recipe, data=replace(recipe.data, root=data_root))
    return resolve_paths(recipe)


@dataclass(frozen=True)
class StageRun:
    """One stage of one variant or of several: a run's folder, and its config with only this
    stage."""

    title: str
    folder: Path
    config: Config

    @property
    def stage(self) -> StageConfig:
        return self.config.stages[0]


@dataclass(frozen=True)
class Chain:
    """A variant with one seed: one run per stage, each started from the one before; the last one
    is evaluated."""

    variant: Variant
    runs: tuple[StageRun, ...]


_UNREACHED: dict[Loss, set[str]] = {
    "rpn": {"roi", "box_head", "mask_head", "mask_iou_head"},
    "box": {"mask_head", "mask_iou_head"},
    "box2": {"mask_head", "mask_iou_head"},
    "box3": {"mask_head", "mask_iou_head"},
    "mask": {"mask_iou_head"},
    "mask_iou": set(),
    "depth": set(),
}
"""Parts of `config.model` that a loss does not reach."""


def _what_counts(config: Config) -> Config:
    """`config`, of one stage, without what none of its losses reaches: parts of the model, and the
    pattern that freezes the mask-IoU head.

    Where it is equal, training is. `init_from` is part of it, so the stages before are equal too.
    What is frozen is all that is not trained, further box heads or not.
    """
    (stage,) = config.stages
    unread = set.intersection(*(_UNREACHED[loss] for loss in stage.losses))
    default = {part: getattr(ModelConfig(), part) for part in unread}
    model = replace(config.model, **default)
    if stage.losses == ("box",):
        model = replace(model, box_head=replace(model.box_head, cascade=()))
    return replace(config, model=model, stages=(replace(stage, frozen=()),))


def plan(recipe: Config, workdir: Path, *, seeds: int) -> list[list[Chain]]:
    """The chains of every seed, in the order of VARIANTS.

    Equal stages are one `StageRun`, that of the first variant that has it.
    """
    cache = recipe.data.cache or str(workdir.resolve() / "data")
    recipe = replace(recipe, data=replace(recipe.data, cache=cache))
    trained: dict[Config, StageRun] = {}

    def chain(variant: Variant, seed: int) -> Chain:
        config = variant.change(replace(recipe, seed=seed))
        title = f"{variant.title}, seed {seed}" if seeds > 1 else variant.title
        parent = workdir / f"seed{seed}" / variant.title.replace(" ", "-")
        runs: list[StageRun] = []
        for stage in config.stages:
            own = replace(config, stages=(stage,))
            if runs:
                before = str(runs[-1].folder.resolve())
                own = replace(own, init_from=before, init_without_classes=False)
            run = StageRun(title, parent / stage.name, own)
            runs.append(trained.setdefault(_what_counts(own), run))
        return Chain(variant, tuple(runs))

    return [[chain(variant, recipe.seed + i) for variant in VARIANTS] for i in range(seeds)]
