"""Properties of what is chosen, and known recipes that it should come close to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from mrcnn_jax.choices.choose import choose
from mrcnn_jax.choices.devices import Device, Devices
from mrcnn_jax.choices.recipes import Start
from mrcnn_jax.choices.table import Chosen
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import from_dict, load_config_file, to_dict
from mrcnn_jax.config.model import ConvNeXtConfig, ModelConfig
from mrcnn_jax.config.optional_heads import following_heads
from mrcnn_jax.config.schema import Config
from mrcnn_jax.config.tables import DETECTRON2_C4, TORCHVISION
from mrcnn_jax.data.records import Category, CocoDataset, ImageRecord, ObjectRecord
from mrcnn_jax.data.report import Report
from mrcnn_jax.pixels.transforms import plan_for
from mrcnn_jax.training.stages import labels

GOLDEN = Path(__file__).parents[1] / "golden"
CONVNEXT_B = replace(
    TORCHVISION,
    trunk="convnext",
    convnext=ConvNeXtConfig(blocks=(3, 3, 27, 3), channels=(128, 256, 512, 1024)),
)
CPU, GPU = Devices("cpu"), Devices("gpu")
WHOLE = Start("runs/tv", TORCHVISION, ("person",))
TRUNK = Start("resnet50.pth", TORCHVISION, has_heads=False)
Image = tuple[int, int, list[tuple[int, float]]]  # height, width, (label, side) of each object


def dataset(images: list[Image], classes: int = 2, name: str = "train.json") -> CocoDataset:
    """Squares in the upper left corner."""
    records = tuple(
        ImageRecord(
            number,
            f"{number}.png",
            height,
            width,
            tuple(
                ObjectRecord(place, label, (0.0, 0.0, side, side), None, False, side**2)
                for place, (label, side) in enumerate(objects)
            ),
        )
        for number, (height, width, objects) in enumerate(images)
    )
    categories = tuple(Category(n, f"class {n}") for n in range(1, classes + 1))
    empty = CocoDataset(categories, (), Report(), Path(name), Path("images"), len(records))
    return empty.with_images(records)


def config_of(images: list[Image], device: Device = "cpu", **options: object) -> Config:
    """With the options of `choose`, and others as fields that are given: `data__short_side`."""
    start: Any = options.pop("start", None)
    val = dataset(images[:1], name="val.json")
    fields = {name.replace("__", "."): value for name, value in options.items()}
    return choose(dataset(images), val, Devices(device), fields, start=start).config


def likeness(count: int, height: int, width: int, sides: list[float]) -> list[Image]:
    return [(height, width, [(1 + i % 2, side) for i, side in enumerate(sides)])] * count


SIDE = st.integers(20, 3000)
IMAGES = st.lists(
    st.tuples(SIDE, SIDE, st.lists(st.tuples(st.integers(1, 2), st.floats(1, 20)), max_size=60)),
    min_size=2,
    max_size=12,
).filter(lambda images: any(objects for *_, objects in images))


@settings(deadline=None, max_examples=40)
@given(IMAGES, st.sampled_from(["cpu", "gpu"]), st.sampled_from([None, TRUNK]))
def test_what_every_choice_has(images: list[Image], device: Device, start: Start | None) -> None:
    config = config_of(images, device, start=start)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    data, model, (stage,) = config.data, config.model, config.stages
    enlarged = 0
    for height, width, objects in images:
        plan = plan_for(height, width, data)  # fits, or there is none
        enlarged += plan.resized[0] > 1.5 * height + 1 and data.short_side > 32
        assert len(objects) <= min(data.max_objects, model.box_head.detections)
        assert len(objects) <= model.rpn.proposals
    assert enlarged <= 0.1 * len(images) + 1
    assert data.short_side <= {"cpu": 320, "gpu": 800}[device]
    assert data.long_side <= {"cpu": 640, "gpu": 1333}[device]
    assert data.max_objects % 8 == 0
    fineness = 14 if device == "cpu" and start else 7
    assert model.roi.canonical_size == fineness * model.rpn.scales[0]
    updates = stage.epochs * -(-len(images) // data.batch_size)
    assert stage.optimizer.warmup_steps <= updates / 10
    assert model.mask_head.samples <= model.box_head.samples * model.box_head.positive_fraction


def test_on_a_cpu_it_is_the_profile_of_coco300() -> None:
    """configs/coco300_cpu.py has 300 to 480 and these anchors; maps are twice as fine."""
    recipe = load_config_file("coco300_cpu").model
    config = config_of(likeness(300, 300, 450, [20, 60, 200]), start=TRUNK)
    assert (config.data.short_side, config.data.long_side) == (320, 480)
    assert config.data.canvases == ((320, 480), (480, 320))
    assert config.model.rpn.scales == recipe.rpn.scales == (16, 32, 64, 128, 256)
    assert config.model.roi.canonical_size == 2 * recipe.roi.canonical_size == 224.0
    assert config.stages[0].epochs == 10
    assert config.model.mask_head.samples == 8
    assert config.data.batch_size == 2


def test_a_resnet_alone_trains_a_narrow_network_on_a_cpu() -> None:
    """The network and the stage of configs/finetune_cpu.py; of a detector, its own network."""
    images = likeness(300, 300, 450, [20, 60, 200])
    recipe = load_config_file("finetune_cpu")
    config = config_of(images, start=TRUNK)
    assert config.data.augment == recipe.data.augment
    assert config.data.canvases == recipe.data.canvases
    heads = replace(recipe.model.mask_head, samples=8)
    assert config.model == replace(recipe.model, num_classes=2, mask_head=heads)
    assert config.stages == recipe.stages
    wide = config_of(images, start=WHOLE)
    assert wide.model.fpn_channels == 256
    assert (len(config.model.box_head.cascade), wide.model.box_head.cascade) == (2, ())
    assert wide.stages[0].train == load_config_file("finetune").stages[0].train
    assert config_of(images, "gpu", start=TRUNK).model.fpn_channels == 256


def test_on_a_cpu_three_images_in_four_keep_the_short_side() -> None:
    images = likeness(30, 400, 600, [9]) + likeness(9, 400, 900, [9])
    assert config_of(images).data.long_side == 480
    assert config_of(images, "gpu").data.long_side == 1333


def test_on_a_gpu_it_is_torchvisions() -> None:
    """Photographs of COCO's size, with objects of COCO's sizes."""
    config = config_of(
        likeness(300, 480, 800, [25, 80, 300]),
        "gpu",
        start=WHOLE,
    )
    recipe = load_config_file("finetune")
    assert (config.data.short_side, config.data.long_side) == (720, 1216)
    config = config_of(
        likeness(300, 600, 1000, [25, 80, 300]),
        "gpu",
        start=WHOLE,
    )
    assert (config.data.short_side, config.data.long_side) == (800, 1333)
    assert config.data.canvases == recipe.data.canvases
    assert config.model == replace(
        TORCHVISION, num_classes=2, mask_head=replace(TORCHVISION.mask_head, samples=128)
    )
    assert config.init_without_classes
    assert config.data.shrink == "area"
    (stage,), (known,) = config.stages, recipe.stages
    assert stage == replace(known, epochs=20, optimizer=stage.optimizer)
    assert stage.optimizer == replace(known.optimizer, warmup_steps=300)


@pytest.mark.parametrize(
    ("images", "device", "epochs", "random"),
    [
        (4, "cpu", 300, 600),  # 600 updates, of two images or of all
        (10, "cpu", 120, 300),
        (300, "cpu", 10, 50),
        (5000, "cpu", 4, 4),
        (20_000, "cpu", 1, 1),
        (300, "gpu", 20, 50),
        (5000, "gpu", 12, 12),
        (20_000, "gpu", 4, 4),
        (46_000, "gpu", 1, 1),
        (120_000, "gpu", 0.75, 0.75),
    ],
)
def test_epochs(images: int, device: Device, epochs: int, random: int) -> None:
    for start, expected in ((TRUNK, epochs), (None, random)):
        config = config_of(likeness(images, 40, 40, [9]), device, start=start)
        assert config.stages[0].epochs == expected


def test_the_weights_scales_stay_unless_objects_are_smaller() -> None:
    start = Start("runs/tv", replace(TORCHVISION, num_classes=2), ("class 1", "class 2"))
    large, small = (config_of(likeness(9, 320, 320, [side]), start=start) for side in (100.0, 10.0))
    assert large.model.rpn.scales == TORCHVISION.rpn.scales
    assert small.model.rpn.scales == (8, 16, 32, 64, 128)
    assert not large.init_without_classes  # they are the same


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("scratch", None),
        ("finetune_cpu", TRUNK),
        ("tables.TORCHVISION", WHOLE),
        ("shapes", Start("runs/a", load_config_file("shapes").model)),
    ],
)
def test_the_stage_table_names_every_parameter(name: str, start: Start | None) -> None:
    """By the paths of the network that is trained, as tests/golden has them."""
    lines = (GOLDEN / f"{name}.parameters.txt").read_text().splitlines()
    paths = [tuple(line.split()[0].split("/")) for line in lines]
    params = unflatten_dict({path: 0 for path in paths if path[-1] not in ("mean", "var")})
    config = config_of(likeness(9, 90, 90, [9]), start=start)
    assert labels(following_heads(config).stages[0], params)


def test_random_weights_train_the_network_of_scratch() -> None:
    recipe = load_config_file("scratch")
    config = config_of(likeness(9, 90, 90, [9]))
    assert config.model.resnet == recipe.model.resnet
    assert config.model.box_head == replace(recipe.model.box_head, detections=100)
    assert config.model.mask_head == recipe.model.mask_head
    (stage,), (known,) = config.stages, recipe.stages
    assert (stage.train, stage.frozen) == (known.train, ())
    warmup = stage.optimizer.warmup_steps
    assert stage.optimizer == replace(known.optimizer, warmup_steps=warmup)
    assert config.data.batch_size == 8


def test_rare_classes_are_repeated() -> None:
    """One image in 21 has class 2: of a threshold of 2/21, the square root of 2 times an epoch."""
    images: list[Image] = [(90, 90, [(1, 9.0)])] * 20 + [(90, 90, [(2, 9.0)])]
    assert config_of(images).data.repeat_threshold == pytest.approx(2 / 21)
    images += [(90, 90, [(2, 9.0)])]
    assert config_of(images).data.repeat_threshold == 0.0


def test_crowded_images() -> None:
    config = config_of(likeness(3, 90, 90, [5.0] * 150))
    assert config.data.max_objects == 152
    assert config.model.box_head.detections == 300
    assert config.model.rpn.proposals == 304
    assert config.model.rpn.pre_nms >= 304
    rpn = config_of(likeness(3, 900, 900, [5.0] * 1200), "gpu", start=TRUNK).model.rpn
    assert rpn.pre_nms == rpn.proposals == rpn.train_pre_nms == rpn.train_proposals == 2400


def test_objects_that_vanish_are_told() -> None:
    """A large image with small objects, which are 2 px on the canvas of a CPU."""
    images = likeness(3, 4000, 4000, [25.0] * 9)
    chosen = choose(dataset(images), dataset(images[:1]), CPU)
    line = next(row for row in chosen.table(chosen.config) if row.startswith("anchors"))
    assert "; half are under 8 px" in line
    assert "convert tile" in line


def test_a_gpu_is_fed_by_all_cores() -> None:
    images = dataset(likeness(300, 600, 800, [50.0]))
    for cores, threads in ((4, 4), (64, 16)):
        chosen = choose(images, images, Devices("gpu", cores=cores))
        assert chosen.config.data.threads == threads
        assert chosen.config.data.eval_batch_size == chosen.config.data.batch_size
        assert chosen.config.save_every_steps == 5000


def test_what_is_given_is_followed() -> None:
    images = likeness(300, 300, 450, [20, 60])
    config = config_of(
        images,
        data__short_side=160,
        data__batch_size=6,
        stages__0__epochs=1,
        start=WHOLE,
    )
    assert (config.data.short_side, config.data.long_side) == (160, 256)
    assert config.data.canvases == ((160, 256), (256, 160))
    optimizer = config.stages[0].optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (pytest.approx(0.015), 5)
    config = config_of(images, data__canvases=((256, 256),))
    assert config.data.canvases == ((256, 256),)
    assert (config.data.short_side, config.data.long_side) == (256, 256)


def test_what_depends_on_a_field_follows_the_one_given() -> None:
    """Each figure by hand."""
    images = likeness(300, 300, 450, [20, 60])
    plain = config_of(images, start=WHOLE)
    assert plain.model.roi.canonical_size == 224.0
    finer = replace(TORCHVISION, roi=replace(TORCHVISION.roi, canonical_size=112.0))
    own = config_of(images, start=Start("runs/a", finer, ("person",)))
    assert own.model.roi.canonical_size == 112.0
    config = config_of(images, model__rpn__scales=(4, 8, 16, 32, 64))
    assert config.model.rpn.scales == (4, 8, 16, 32, 64)
    assert config.model.roi.canonical_size == 28.0
    samples = {"model__box_head__samples": 24, "model__box_head__positive_fraction": 0.5}
    config = config_of(likeness(300, 300, 450, [20, 60] * 8), "gpu", **samples)
    assert config.model.mask_head.samples == 12
    config = config_of(likeness(9, 90, 90, [9.0] * 40), data__augment__copy_paste=0.5)
    assert config.data.max_objects == 80
    rates = {"stages__0__optimizer__name": "adamw", "stages__0__optimizer__learning_rate": 2e-4}
    optimizer = config_of(images, start=WHOLE, **rates).stages[0].optimizer
    assert (optimizer.name, optimizer.learning_rate) == ("adamw", 2e-4)
    config = config_of(images, start=WHOLE, stages__0__optimizer__accumulate_steps=4)
    before, after = plain.stages[0].optimizer, config.stages[0].optimizer
    assert config.stages[0].epochs == plain.stages[0].epochs
    assert after.learning_rate == pytest.approx(4 * before.learning_rate)
    assert (after.batch_size, after.warmup_steps) == (8, before.warmup_steps // 4)
    adam = config_of(images, data__batch_size=2).stages[0].optimizer
    assert (adam.batch_size, adam.learning_rate) == (8, 2e-3)  # which training then tells


def test_epochs_count_the_images_that_are_trained_on() -> None:
    """Nine in ten are empty; one in ten of the rest has class 2, each shown three times."""
    images: list[Image] = [(90, 90, [(1, 9.0)])] * 90 + [(90, 90, [(2, 9.0)])] * 10
    images += [(90, 90, [])] * 900
    shown = {"data__keep_empty": False, "data__repeat_threshold": 0.9}
    config = config_of(images, start=TRUNK, **shown)
    factor = (0.9 / 0.1) ** 0.5
    assert config.stages[0].epochs == round(3000 / (90 + 10 * factor))
    assert config_of(images, start=TRUNK).stages[0].epochs == 4


def test_choices_that_nobody_asked_for_give_way() -> None:
    """To fields that rule them out; a cascade that is asked for needs a box for all classes."""
    images = likeness(9, 90, 90, [9])
    assert config_of(images).model.box_head.cascade == (0.6, 0.7)
    frozen = config_of(images, stages__0__frozen=("resnet/stem/.*",))
    assert frozen.stages[0].frozen == ("resnet/stem/.*",)
    for fields in (
        {"model__box_head__class_agnostic": False},
        {"model__box_head__foreground_iou": 0.6},
    ):
        assert config_of(images, **fields).model.box_head.cascade == ()
    for loss, agnostic in (("focal", True), ("softmax", False)):
        head = config_of(images, model__mask_head__loss=loss).model.mask_head
        assert (head.loss, head.soft_targets, head.class_agnostic) == (loss, False, agnostic)
    start = Start("runs/a", replace(TORCHVISION, num_classes=2))
    cascade = {"start": start, "model__box_head__cascade": (0.6,)}
    box_head = config_of(images, **cascade).model.box_head
    assert (box_head.cascade, box_head.class_agnostic) == ((0.6,), True)


def test_a_convnext_from_random_weights() -> None:
    """All of it is trained, by the optimiser of scratch."""
    images = dataset(likeness(9, 90, 90, [9]))
    fields = {"model.trunk": "convnext", "model.convnext.blocks": (1, 1, 1, 1)}
    chosen = choose(images, images, GPU, fields)
    config, (stage,) = chosen.config, chosen.config.stages
    assert config.model.convnext.blocks == (1, 1, 1, 1)
    assert (stage.train[0].pattern, stage.frozen) == ("convnext/.*", ())
    assert stage.optimizer.name == "adam"
    rows = {row.what: row for row in chosen.rows}
    assert rows["network"].options[0] == "--model.trunk"
    assert rows["batch"].why.startswith("as in configs/scratch.py")
    with pytest.raises(
        ConfigError, match=r"^model\.trunk: convnext, but resnet50\.pth needs a config with"
    ):
        config_of(
            likeness(9, 90, 90, [9]),
            start=TRUNK,
            model__trunk="convnext",
        )


def test_live_norms_that_are_asked_for_are_trained() -> None:
    fields = {"start": TRUNK, "model__resnet__norm": "live"}
    (stage,) = config_of(likeness(9, 90, 90, [9]), **fields).stages
    assert (stage.train[0].pattern, stage.frozen) == ("resnet/.*", ())
    assert stage.optimizer.name == "adamw"


def test_the_batch_follows_the_network_that_is_given() -> None:
    """Maps four times as wide need four times the memory."""
    images, devices = dataset(likeness(9, 320, 480, [9])), Devices("cpu", memory=4 * 2**30)
    plain = choose(images, images, devices).config
    wide = choose(images, images, devices, {"model.fpn_channels": 512}).config
    assert plain.data.batch_size > wide.data.batch_size


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"data.batch_size": 0}, "data.batch_size: must be at least 1"),
        ({"stages.0.epochs": 0.0}, "stages.joint.epochs: must be positive"),
        ({"data.short_side": 0}, "data.short_side: must be in 1..data.long_side"),
        (
            {"data.short_side": 90, "data.long_side": 64},
            "data.short_side: must be in 1..data.long_side",
        ),
        (
            {"data.canvases": ((50, 50),)},
            "data.canvases: 50 x 50: sides must be positive multiples of 32",
        ),
        (
            {"data.canvases": ((0, 0),)},
            "data.canvases: 0 x 0: sides must be positive multiples of 32",
        ),
        ({"stages.0.epochs": -1.0}, "stages.joint.epochs: must be positive"),
        (
            {"model.backbone": "c4"},
            "model.backbone: c4: nothing is chosen for such a network: write a config",
        ),
        (
            {"model.depth_head.kind": "roi"},
            "model.depth_head.kind: roi: nothing is chosen for such a network: give a config, "
            "--config finetune for example, which gets a stage for it",
        ),
        (
            {"stages.0.optimizer.name": "sgd"},
            "stages.0.optimizer.name: sgd: give --stages.0.optimizer.learning-rate as well: the "
            "one that would be chosen is for adam",
        ),
        (
            {"model.convnext.drop_path": 0.1},
            "model.convnext.drop_path: this network has a ResNet, no ConvNeXt",
        ),
    ],
)
def test_what_is_given_may_be_wrong(fields: dict[str, Any], line: str) -> None:
    images = dataset(likeness(9, 90, 90, [9]))
    with pytest.raises(ConfigError, match=f"^{line}"):
        choose(images, images, CPU, fields)


def test_one_pixel_is_enough() -> None:
    config = config_of(likeness(9, 90, 90, [9]), data__short_side=1)
    assert config.data.short_side == 1
    assert min(config.model.rpn.scales) >= 1


def test_the_short_side_follows_a_long_side_given() -> None:
    config = config_of(likeness(9, 90, 90, [9]), data__long_side=64)
    assert (config.data.short_side, config.data.long_side) == (64, 64)


def test_reasons_are_those_that_decided() -> None:
    """Few images meet the most epochs; boxes train no masks; norms that are live train whole."""
    images = dataset(likeness(30, 90, 90, [9]))
    live = replace(TORCHVISION, resnet=replace(TORCHVISION.resnet, norm="live"))
    for model, trained in ((TORCHVISION, "as in configs/finetune.py"), (live, "batch norms are")):
        start = Start("runs/a", model, images.class_names)
        chosen = choose(images, images, CPU, start=start)
        reasons = {row.what: row.why for row in chosen.rows}
        assert reasons["epochs"] == "3000 images shown would be 100; 4 to 60 are allowed"
        assert reasons["masks trained per image"].startswith("no object has a mask")
        assert reasons["trained"].startswith(trained)
    many = dataset(likeness(20_000, 90, 90, [9]))
    rows = choose(many, images, GPU, start=TRUNK).rows
    assert "at most 90000 images shown" in {row.why for row in rows}


@pytest.mark.parametrize(
    ("classes", "names", "anew"),
    [(2, (), False), (3, (), True), (2, ("class 1", "class 2"), False), (2, ("a", "b"), True)],
)
def test_outputs_per_class_start_anew_for_other_classes(
    classes: int, names: tuple[str, ...], anew: bool
) -> None:
    """Where nobody knows their names, their number alone decides."""
    images = dataset(likeness(30, 90, 90, [9]))
    start = Start("a.pth", replace(TORCHVISION, num_classes=classes), names)
    found = choose(images, images, CPU, start=start)
    assert found.config.init_without_classes == anew


def test_images_shrink_as_for_the_run_that_training_starts_from() -> None:
    images = dataset(likeness(30, 900, 900, [9]))
    start = Start("runs/a", TORCHVISION, images.class_names, "bilinear")
    chosen = choose(images, images, CPU, start=start)
    assert chosen.config.data.shrink == "bilinear"
    (line,) = (line for line in chosen.table(chosen.config) if "made smaller" in line)
    assert " ".join(line.split()) == "made smaller by bilinear as for runs/a other --weights"
    alone = choose(images, images, CPU, start=TRUNK)
    assert alone.config.data.shrink == "area"
    assert "made smaller by" not in {row.what for row in alone.rows}


@pytest.mark.parametrize(
    ("trunk", "name", "batch"),
    [
        (replace(TORCHVISION, trunk="convnext"), "ConvNeXt-T", 8),
        (CONVNEXT_B, "ConvNeXt-B", 4),
        (replace(TORCHVISION, resnet=replace(TORCHVISION.resnet, depth=101)), "ResNet-101", 4),
    ],
)
def test_the_batch_is_that_of_the_trunk_in_the_file(
    trunk: ModelConfig, name: str, batch: int
) -> None:
    """On a GPU of 40 GB, of which JAX takes three quarters. With SGD, 8 images would leave 38
    updates an epoch."""
    images = dataset(likeness(300, 800, 1333, [20, 60, 200]))
    devices = Devices("gpu", memory=30 * 2**30)
    start = Start("weights.safetensors", trunk, has_heads=False)
    chosen = choose(images, images, devices, start=start)
    assert chosen.config.model.trunk_name == name
    assert chosen.config.data.batch_size == batch


@pytest.mark.parametrize(("device", "recipe"), [("cpu", "finetune_cpu"), ("gpu", "finetune")])
def test_a_convnext_alone_has_the_recipe_of_a_resnet(device: Device, recipe: str) -> None:
    """But the optimiser of configs/convnext.py on a GPU; every parameter is trained or frozen."""
    images = dataset(likeness(300, 600, 900, [20, 60, 200]))
    start = replace(TRUNK, model=replace(TORCHVISION, trunk="convnext"))
    chosen = choose(images, images, Devices(device), start=start)
    like = choose(images, images, Devices(device), start=TRUNK).config
    config, (stage,) = chosen.config, chosen.config.stages
    assert replace(config.model, trunk="resnet") == like.model
    assert (stage.optimizer.name, stage.optimizer.decay_vectors) == ("adamw", False)
    theirs = like.stages[0]
    same = replace(stage, train=theirs.train, frozen=theirs.frozen, optimizer=theirs.optimizer)
    assert same == theirs
    if device == "gpu":
        own = load_config_file("convnext").stages[0].optimizer
        assert stage.optimizer.learning_rate == own.learning_rate
        assert config.data.batch_size == 8
    else:
        assert stage.optimizer == theirs.optimizer
    lines = (GOLDEN / "convnext.parameters.txt").read_text().splitlines()
    paths = {tuple(line.split()[0].split("/")): None for line in lines}
    kinds = labels(stage, unflatten_dict(paths))["convnext"]
    trained = {name for name, tree in kinds.items() if "frozen" not in str(tree)}
    last = {"stage4", "norm2", "norm3", "norm4", "norm5"}
    assert trained == (last if device == "cpu" else last | {"stage2", "stage3"})
    rows = {row.what: (row.value(config), row.why, row.options) for row in chosen.rows}
    assert rows["network"][0].startswith("ConvNeXt-T, FPN of ")
    assert "ConvNeXt" in rows["network"][1]
    assert rows["network"][2] == ("other --weights", "--model.fpn-channels")
    assert "stage" in rows["trained"][0]
    assert rows["trained"][1] == f"as in configs/{recipe}.py"


def test_a_run_with_a_convnext_is_trained_like_one() -> None:
    start = replace(WHOLE, model=replace(TORCHVISION, trunk="convnext"))
    images = dataset(likeness(9, 90, 90, [9]))
    for devices, batch, why in (
        (CPU, 2, "as in configs/finetune.py"),
        (GPU, 8, "as in configs/convnext.py, halved"),
    ):
        chosen = choose(images, images, devices, start=start)
        (row,) = (row for row in chosen.rows if row.what == "batch")
        assert (chosen.config.data.batch_size, row.why.partition(";")[0]) == (batch, why)
    config = chosen.config
    assert config.model.trunk == "convnext"
    assert config.stages[0].frozen == ("convnext/(stem|stage[1])/.*",)


def test_a_c4_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^init_from: runs/c4: a C4 network"):
        config_of(likeness(9, 90, 90, [9]), start=Start("runs/c4", DETECTRON2_C4))


def choose_on_gpus(images: CocoDataset, devices: Devices, fields: dict[str, Any]) -> Chosen:
    """From weights of torchvision's whole network."""
    return choose(images, images, devices, fields, start=WHOLE)


def test_the_batch_follows_memory_and_the_rate_follows_it() -> None:
    """1000 images in batches of 8 are 125 updates an epoch."""
    images = dataset(likeness(1000, 600, 1000, [25, 80, 300]))
    devices = Devices("gpu", memory=80 * 2**30)
    recipe = load_config_file("finetune").stages[0].optimizer
    six = {"data.batch_size": 6}
    for fields, size, why in (({}, 8, "the most; needs about 10.2 GiB"), (six, 6, "")):
        chosen = choose_on_gpus(images, devices, fields)
        optimizer = chosen.config.stages[0].optimizer
        assert (chosen.config.data.batch_size, optimizer.batch_size) == (size, size)
        assert optimizer.learning_rate == pytest.approx(recipe.learning_rate * size / 2)
        assert optimizer.warmup_steps == min(500, 12 * -(-1000 // size) // 10)
        (line,) = (line for line in chosen.table(chosen.config) if "--data.batch-size" in line)
        assert why in line


def test_the_rate_of_a_large_batch_is_explained() -> None:
    """On 16 GPUs, too, where the recipe's batch becomes one image on each."""
    images = dataset(likeness(1000, 600, 1000, [25, 80, 300]))
    for fields, devices, size, rate in (
        ({"data.batch_size": 32}, GPU, 32, 0.04),
        ({"stages.0.optimizer.accumulate_steps": 16}, GPU, 32, 0.04),
        ({}, Devices("gpu", 16), 16, 0.02),
    ):
        chosen = choose_on_gpus(images, devices, fields)
        optimizer = chosen.config.stages[0].optimizer
        assert (optimizer.learning_rate, optimizer.batch_size) == (pytest.approx(rate), size)
        (why,) = (row.why for row in chosen.rows if row.what == "optimiser")
        assert why.startswith("the rate of 8 images up to 16, above in proportion (not tried here)")


def test_every_option_of_the_table_exists() -> None:
    images = dataset(likeness(9, 90, 90, [9]))
    chosen = choose(images, images, CPU)
    options = {option for row in chosen.rows for option in row.options}
    assert {"--model.rpn.proposals", "--validate-every-epochs"} <= options
    assert "--minutes" in options  # the only one that is no field
    for option in options - {"--minutes"}:
        value: object = chosen.config
        for name in option.removeprefix("--").replace("-", "_").split("."):
            value = value[int(name)] if name.isdigit() else getattr(value, name)  # type: ignore[index]


def test_classes_without_objects_are_told() -> None:
    """Roboflow's category 0, a supercategory, is such a one."""
    train = dataset([(90, 90, [(2, 9.0)])] * 3, classes=2)
    chosen = choose(train, train, CPU)
    assert chosen.config.model.num_classes == 2
    assert chosen.config.data.class_names == ("class 1", "class 2")
    assert any("without objects: class 1" in line for line in chosen.table(chosen.config))


def test_other_networks_parameters_stay() -> None:
    """A start keeps every shape: only outputs per class may change."""
    start = ModelConfig(fpn_channels=64)
    model = config_of(
        likeness(9, 90, 90, [9]), start=Start("run", start, ("class 1", "class 2"))
    ).model
    assert (model.fpn_channels, model.resnet, model.rpn.batch_norm) == (
        start.fpn_channels,
        start.resnet,
        start.rpn.batch_norm,
    )
