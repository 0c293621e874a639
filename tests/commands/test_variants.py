"""The variants of the report's experiments, and the runs that are planned for them, by hand."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import tiny

from mrcnn_jax.commands.variants import Chain, StageRun, load_recipe, plan
from mrcnn_jax.config import tables
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import differences, load_config_file
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Config
from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
from mrcnn_jax.structures import Params
from mrcnn_jax.training.stages import labels, split

ROOT = Path(__file__).parents[2]
WORKDIR = Path("job")
# Every variant's chain, by hand: which folder each of its stages is trained in.
CHAINS = {
    "baseline": ("baseline/rpn", "baseline/box", "baseline/mask"),
    "backbone c4": ("backbone-c4/rpn", "backbone-c4/box", "backbone-c4/mask"),
    "roi_op pool": ("baseline/rpn", "roi_op-pool/box", "roi_op-pool/mask"),
    "roi_op warp": ("baseline/rpn", "roi_op-warp/box", "roi_op-warp/mask"),
    "mask_loss focal": ("baseline/rpn", "baseline/box", "mask_loss-focal/mask"),
    "mask_loss focal-even": ("baseline/rpn", "baseline/box", "mask_loss-focal-even/mask"),
    "anchor_ratios one": (
        "anchor_ratios-one/rpn",
        "anchor_ratios-one/box",
        "anchor_ratios-one/mask",
    ),
    "mask_activation softmax": ("baseline/rpn", "baseline/box", "mask_activation-softmax/mask"),
    "training joint": ("training-joint/joint",),
    "box_loss giou": ("baseline/rpn", "box_loss-giou/box", "box_loss-giou/mask"),
    "boxes class-agnostic": (
        "baseline/rpn",
        "boxes-class-agnostic/box",
        "boxes-class-agnostic/mask",
    ),
    "boxes cascade": (
        "baseline/rpn",
        "boxes-class-agnostic/box",
        "boxes-cascade/box2",
        "boxes-cascade/box3",
        "boxes-cascade/mask",
    ),
    "mask_classes agnostic": ("baseline/rpn", "baseline/box", "mask_classes-agnostic/mask"),
    "mask_scoring iou": (
        "baseline/rpn",
        "baseline/box",
        "baseline/mask",
        "mask_scoring-iou/mask_iou",
    ),
}
# What the last run of a variant has otherwise than the baseline's, beside where it starts.
CHANGES = {
    "backbone c4": {
        "model.backbone: 'fpn' -> 'c4'",
        "model.rpn.channels: None -> 16",
        "model.box_head.fcs: 2 -> 0",
        "model.box_head.pool_size: 7 -> 14",
        "model.mask_head.convs: 1 -> 0",
        "model.mask_head.deconv_kernel: 3 -> 2",
    },
    "roi_op pool": {"model.roi.op: 'align' -> 'pool'"},
    "roi_op warp": {"model.roi.op: 'align' -> 'warp'"},
    "mask_loss focal": {"model.mask_head.loss: 'bce' -> 'focal'"},
    "mask_loss focal-even": {
        "model.mask_head.loss: 'bce' -> 'focal'",
        "model.mask_head.focal_alpha: 0.25 -> 0.5",
    },
    "anchor_ratios one": {"model.rpn.ratios: (0.5, 1.0, 2.0) -> (1.0,)"},
    "mask_activation softmax": {"model.mask_head.loss: 'bce' -> 'softmax'"},
    "training joint": set(),
    "box_loss giou": {"model.box_head.box_loss: 'smooth_l1' -> 'giou'"},
    "boxes class-agnostic": {"model.box_head.class_agnostic: False -> True"},
    "boxes cascade": {
        "model.box_head.class_agnostic: False -> True",
        "model.box_head.cascade: () -> (0.6, 0.7)",
    },
    "mask_classes agnostic": {"model.mask_head.class_agnostic: False -> True"},
    "mask_scoring iou": {"model.mask_iou_head.enabled: False -> True"},
}
PRETRAINED = replace(
    tiny.get_config(),
    model=replace(
        tiny.get_config().model, resnet=replace(tiny.get_config().model.resnet, norm="frozen")
    ),
    stages=tables.staged(pretrained=True, epochs=(2, 3, 1)),
    init_from="resnet10.npz",
)


def chains(recipe: Config, *, seed: int = 0, seeds: int = 1) -> dict[str, Chain]:
    return {chain.variant.title: chain for chain in plan(recipe, WORKDIR, seeds=seeds)[seed]}


@functools.cache
def parameter_shapes(model: ModelConfig) -> Params:
    return jax.eval_shape(
        lambda batch: MaskRCNN(model).init(jax.random.key(0), batch), example_batch((64, 64))
    )["params"]


def trained_modules(run: StageRun) -> set[str]:
    """Top-level modules that the run's stage trains, each of them in full."""
    shapes = parameter_shapes(run.config.model)
    trained, frozen = split(shapes, labels(run.stage, shapes))
    assert not trained.keys() & frozen.keys()
    return set(trained)


@pytest.mark.parametrize("seed", [0, 1])
def test_shared_stages_are_one_run(seed: int) -> None:
    found = chains(tiny.get_config(), seed=seed, seeds=2)
    assert {
        title: tuple(str(run.folder) for run in chain.runs) for title, chain in found.items()
    } == {
        title: tuple(f"job/seed{seed}/{folder}" for folder in folders)
        for title, folders in CHAINS.items()
    }
    runs = {run for chain in found.values() for run in chain.runs}
    assert len(runs) == len({run.folder for run in runs}) == 26
    assert {run.config.seed for run in runs} == {seed}


def test_each_stage_starts_from_the_one_before() -> None:
    recipe = replace(PRETRAINED, init_from="another_run", init_without_classes=True)
    for chain in chains(recipe).values():
        sources = [
            ("another_run", True),
            *((str(run.folder.resolve()), False) for run in chain.runs[:-1]),
        ]
        assert [
            (run.config.init_from, run.config.init_without_classes) for run in chain.runs
        ] == sources
        assert all(len(run.config.stages) == 1 for run in chain.runs)


def test_what_a_variant_changes_reaches_its_runs() -> None:
    found = chains(tiny.get_config())
    baseline = found["baseline"].runs[-1].config
    assert baseline.model == tiny.get_config().model
    assert {title for title in found if title != "baseline"} == CHANGES.keys()
    for title, expected in CHANGES.items():
        changed = differences(baseline, found[title].runs[-1].config)
        assert {
            line for line in changed if not line.startswith(("init_from:", "stages."))
        } == expected


@pytest.mark.parametrize("recipe", [tiny.get_config(), PRETRAINED], ids=["random", "pretrained"])
def test_what_each_stage_trains(recipe: Config) -> None:
    """The ResNet with the RPN unless it is imported, res5 with the box head, and all that together
    in one stage."""
    resnet = {"resnet"} if recipe.init_from is None else set()
    found = chains(recipe)
    assert [trained_modules(run) for run in found["baseline"].runs] == [
        {"fpn", "rpn"} | resnet,
        {"box_head"},
        {"mask_head"},
    ]
    assert [trained_modules(run) for run in found["backbone c4"].runs] == [
        {"rpn"} | resnet,
        {"res5", "box_head"},
        {"mask_head"},
    ]
    assert [trained_modules(run) for run in found["boxes cascade"].runs[1:]] == [
        {"box_head"},
        {"box_head2"},
        {"box_head3"},
        {"mask_head"},
    ]
    scored = found["mask_scoring iou"].runs
    assert scored[:3] == found["baseline"].runs
    assert trained_modules(scored[3]) == {"mask_iou_head"}
    assert scored[3].stage.epochs == scored[2].stage.epochs
    (joint,) = found["training joint"].runs
    assert trained_modules(joint) == {"fpn", "rpn", "box_head", "mask_head"} | resnet
    assert joint.stage.losses == ("rpn", "box", "mask")
    assert joint.stage.epochs == (2 if recipe.init_from is None else 3)
    for chain in (found["baseline"], found["backbone c4"]):
        assert [(run.stage.epochs, run.stage.optimizer) for run in chain.runs] == [
            (s.epochs, s.optimizer) for s in recipe.stages
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "model=replace(c.model, roi=replace(c.model.roi, op='warp'))",
            "is the variant roi_op warp; it must be the baseline",
        ),
        ("stages=c.stages[:2]", "its stages must be those that tables.staged makes for an FPN"),
        (
            "stages=tables.staged(pretrained=False, backbone='c4')",
            "its stages must be those that tables.staged makes for an FPN",
        ),
    ],
    ids=["a variant", "two stages", "c4"],
)
def test_a_recipe_that_is_no_baseline_is_refused(change: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(
        "from dataclasses import replace\nimport tiny\nfrom mrcnn_jax.config import tables\n"
        f"def get_config():\n    c = tiny.get_config()\n    return replace(c, {change})\n"
    )
    with pytest.raises(ConfigError) as error:
        load_recipe(str(path))
    assert str(error.value) == f"--recipe: {path}: {message}"


@pytest.mark.parametrize("name", ["report_cpu", "coco300", "shapes"])
def test_recipes_of_this_repository(name: str) -> None:
    """Every variant can be made of them, and C4 trains the ResNet in stage 1 if they do."""
    found = chains(load_config_file(ROOT / "configs" / f"{name}.py"))
    assert len({run for chain in found.values() for run in chain.runs}) == 26
    trains = [
        "resnet/.*" in {group.pattern for group in found[title].runs[0].stage.train}
        for title in ("baseline", "backbone c4")
    ]
    assert trains == [name == "shapes"] * 2


def test_a_recipe_that_is_none_is_named() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^--recipe: report_cup: .*no recipe of configs/: bins, .*coco300, .*report_cpu, ",
    ):
        load_recipe("report_cup")
