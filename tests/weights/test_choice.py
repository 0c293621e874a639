"""What weights fix in a config, what stays as it is, and what contradicts them."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import state_dicts

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import with_fields
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Config, DataConfig
from mrcnn_jax.config.tables import DETECTRON2_C4, MMDETECTION, TORCHVISION, TORCHVISION_V2
from mrcnn_jax.weights.choice import (
    CASCADE,
    CONVNEXT,
    HEADS,
    IMAGES,
    RESNET,
    Choice,
    choose,
    chosen_before,
)
from mrcnn_jax.weights.families import MASK_RCNN_FPN, MASKRCNN, MASKRCNN_V2
from mrcnn_jax.weights.family import Family
from mrcnn_jax.weights.mmdetection import MASK_RCNN
from mrcnn_jax.weights.origin import Origin, open_origin

# Fields that can be others than those of the weights: how the network is trained, which proposals
# and detections it keeps, and which images it is made for.
FREE = {
    *("num_classes", "compute_dtype", "remat", "resnet.norm"),
    *("convnext.layer_scale", "convnext.drop_path"),
    *(f"rpn.{name}" for name in ("scales", "anchors_in_padding", "positive_iou", "negative_iou")),
    *(f"rpn.{name}" for name in ("anchors_across_border", "crowd_overlap", "samples")),
    *(f"rpn.{name}" for name in ("positive_fraction", "box_loss", "smooth_l1_beta", "nms_iou")),
    *(f"rpn.{name}" for name in ("objectness_loss_weight", "box_loss_weight", "pre_nms")),
    *(f"rpn.{name}" for name in ("train_pre_nms", "proposals", "train_proposals", "min_size")),
    *(f"roi.{name}" for name in ("sampling_ratio", "max_sampling_ratio", "level_epsilon")),
    *(f"roi.{name}" for name in ("canonical_size", "canonical_level")),
    *(f"box_head.{name}" for name in ("foreground_iou", "crowd_overlap", "samples", "nms_iou")),
    *(f"box_head.{name}" for name in ("positive_fraction", "box_loss", "smooth_l1_beta")),
    *(f"box_head.{name}" for name in ("class_loss_weight", "box_loss_weight", "min_size")),
    *(f"box_head.{name}" for name in ("score_threshold", "detections")),
    *(f"mask_head.{name}" for name in ("train_on", "match_iou", "samples", "loss", "paste")),
    *(f"mask_head.{name}" for name in ("focal_gamma", "focal_alpha", "loss_weight")),
    "mask_head.soft_targets",
}


# Modules that weights may lack.
LACKING = {
    "depth_head",
    "mask_iou_head",
    "refine",
    *(f"box_head.cascade{name}" for name in ("", "_loss_weights")),
}


def fields_of(config: Any, prefix: str = "") -> set[str]:
    """Dotted names, but for those in the tables of `LACKING`."""
    names: set[str] = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not dataclasses.is_dataclass(value):
            names |= {prefix + field.name} - LACKING
        elif field.name not in LACKING:
            names |= fields_of(value, f"{prefix}{field.name}.")
    return names


def test_every_field_of_the_network_is_fixed_or_free() -> None:
    """A new field has to be put in one of the two."""
    fixed = {*RESNET, *CONVNEXT, *HEADS, *CASCADE}
    assert len(fixed) + len(FREE) == len(fields_of(ModelConfig()))
    assert fixed | FREE == fields_of(ModelConfig())


def choice(model: ModelConfig, *presumed: str, names: tuple[str, ...] = ()) -> Choice:
    fields = {f"model.{name}": attrgetter(name)(model) for name in (*RESNET, *HEADS)}
    return Choice(Path("w.pth"), "somebody's", fields, presumed, model.num_classes, names)


@pytest.mark.parametrize("model", [TORCHVISION, TORCHVISION_V2, MMDETECTION])
def test_the_network_becomes_that_of_the_weights(
    model: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a line for each field that it changes or that a ResNet has; the rest stays."""
    changed = choice(model).applied(Config(name="mine"), given=())
    assert changed.name == "mine"
    for name in (*RESNET, *HEADS):
        assert attrgetter(name)(changed.model) == attrgetter(name)(model), name
    for name in FREE:
        assert attrgetter(name)(changed.model) == attrgetter(name)(ModelConfig()), name
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "weights: w.pth: somebody's"
    assert "  model.resnet.depth: 50" in lines
    assert "  model.rpn.batch_norm: False (the config has True)" in lines
    convs = "  model.box_head.convs: 4 (the config has 0)"
    assert (convs in lines) == (model is TORCHVISION_V2)
    assert lines[-1].endswith(" more fields of the network are as in the config")
    before = {name: attrgetter(name)(ModelConfig()) for name in (*RESNET, *HEADS)}
    different = [name for name in before if before[name] != attrgetter(name)(model)]
    assert [line for line in lines if "the config has" in line] == [
        f"  model.{name}: {attrgetter(name)(model)} (the config has {before[name]})"
        for name in different
    ]


def test_what_the_user_gave_stays_or_contradicts(capsys: pytest.CaptureFixture[str]) -> None:
    config = with_fields(Config(), {"model.resnet.norm_epsilon": 1e-3, "model.resnet.depth": 34})
    weights = choice(TORCHVISION, "model.resnet.norm_epsilon")
    given = "model.resnet.norm_epsilon", "model.rpn.convs", "workdir"
    changed = weights.applied(config, given)
    assert (changed.model.resnet.norm_epsilon, changed.model.resnet.depth) == (1e-3, 50)
    line = "model.resnet.norm_epsilon: 0.001, as given (presumably 1e-05 in these weights)"
    assert f"  {line}\n" in capsys.readouterr().out
    with pytest.raises(ConfigError) as error:
        weights.applied(config, (*given, "model.resnet.depth"))
    assert str(error.value) == (
        "model.resnet.depth: 34, but w.pth (somebody's) has 50: leave out --model.resnet.depth, "
        "or take other weights"
    )
    same = with_fields(config, {"model.resnet.depth": 50})
    assert weights.applied(same, (*given, "model.resnet.depth")) == changed


def test_masks_of_no_class_may_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    """With weights whose masks are per class, as all published ones are: all else is of use."""
    name = "model.mask_head.class_agnostic"
    changed = choice(TORCHVISION).applied(with_fields(Config(), {name: True}), {name})
    assert changed.model.mask_head.class_agnostic
    line = f"  {name}: True, as given (these weights have False: their mask outputs are left out)"
    assert line in capsys.readouterr().out.splitlines()
    assert not choice(TORCHVISION).applied(changed, ()).model.mask_head.class_agnostic


def test_softmax_keeps_its_masks_of_classes(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the weights have one mask for all classes, which softmax cannot have."""
    agnostic = replace(TORCHVISION, mask_head=replace(TORCHVISION.mask_head, class_agnostic=True))
    loss = {"model.mask_head.loss": "softmax"}
    found = choice(agnostic).applied(with_fields(Config(), loss), set(loss))
    assert not found.model.mask_head.class_agnostic
    assert "False, for model.mask_head.loss softmax (these weights" in capsys.readouterr().out


def test_a_cascade_keeps_its_boxes_of_no_class(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the command line says so or the config: no published weights have them."""
    name, none = "model.box_head.class_agnostic", {"model.box_head.class_agnostic": True}
    cascade = with_fields(Config(), none | {"model.box_head.cascade": (0.6, 0.7)})
    why = "(these weights have False: their box outputs are left out)"
    for config, given, line in (
        (with_fields(Config(), none), {name}, f"  {name}: True, as given {why}"),
        (cascade, set(), f"  {name}: True, for model.box_head.cascade {why}"),
    ):
        changed = choice(TORCHVISION).applied(config, given)
        assert changed.model.box_head.class_agnostic
        assert changed.model.box_head.cascade == config.model.box_head.cascade
        assert line in capsys.readouterr().out.splitlines()
    changed = choice(TORCHVISION).applied(with_fields(Config(), none), ())
    assert not changed.model.box_head.class_agnostic


@pytest.mark.parametrize("family", [MASKRCNN, MASKRCNN_V2, MASK_RCNN_FPN, MASK_RCNN])
def test_images_shrink_as_those_of_a_whole_network_did(
    family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchvision and mmdetection interpolate, detectron2 averages; only a run says so."""
    interpolates = family.project != "detectron2"
    theirs, other = ("bilinear", "area") if interpolates else ("area", "bilinear")
    assert family.model is not None
    origin = Origin(
        "somebody's",
        family.model,
        has_heads=True,
        shrink=family.shrink,
        class_names=(),
        presumed=frozenset({"data.shrink"}),
        load=dict,
    )
    config = with_fields(Config(), {"data.shrink": other})
    assert choose(Path("w.pth"), origin).applied(config, ()).data.shrink == theirs
    assert f"\n  data.shrink: {theirs} (the config has {other})\n" in capsys.readouterr().out
    choose(Path("w.pth"), origin).applied(with_fields(config, {"data.shrink": theirs}), ())
    assert f"\n  data.shrink: {theirs}\n" in capsys.readouterr().out

    assert choose(Path("w.pth"), origin).applied(config, ("data.shrink",)).data.shrink == other
    line = f"  data.shrink: {other}, as given (presumably {theirs} in these weights)\n"
    assert line in capsys.readouterr().out
    of_run = replace(origin, presumed=frozenset())
    with pytest.raises(ConfigError, match=rf"^data\.shrink: {other}, but a .* has {theirs}: leave"):
        choose(Path("a"), of_run).applied(config, ("data.shrink",))

    alone = choose(Path("w.pth"), replace(origin, has_heads=False))
    assert alone.applied(config, ()).data.shrink == other  # a ResNet saw other images


def test_another_backbone_is_refused() -> None:
    """Its stage table could not train it."""
    with pytest.raises(ConfigError, match=r"^model\.backbone: fpn, but w\.pth needs .* with c4$"):
        choice(DETECTRON2_C4).applied(Config(), given=())


def test_another_trunk_is_refused_and_the_sizes_of_the_same_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(state_dicts.tensors(state_dicts.convnext_timm()), path)
    weights = choose(path, open_origin(path))
    with pytest.raises(ConfigError, match=r"^model\.trunk: resnet, but .* needs .* with convnext$"):
        weights.applied(Config(), given=())
    convnext = with_fields(Config(), {"model.trunk": "convnext"})
    with pytest.raises(ConfigError, match=r"^model\.trunk: convnext, but w\.pth needs .* resnet$"):
        choice(TORCHVISION).applied(convnext, given=())
    given = with_fields(convnext, {"model.pixel_mean": (0.5, 0.5, 0.5)})
    found = weights.applied(given, given=("model.pixel_mean",)).model
    assert (found.convnext.blocks, found.convnext.channels) == ((1, 2, 3, 1), (4, 6, 8, 10))
    assert found.pixel_mean == (0.5, 0.5, 0.5)
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"weights: {path}: convnext (timm)",
        "  model.convnext.blocks: (1, 2, 3, 1) (the config has (3, 3, 9, 3))",
        "  model.convnext.channels: (4, 6, 8, 10) (the config has (96, 192, 384, 768))",
    ]
    with pytest.raises(ConfigError, match=r"^model\.convnext\.blocks: \(3, 3, 9, 3\), but .* has"):
        weights.applied(convnext, given=("model.convnext.blocks",))


@pytest.mark.parametrize(
    ("names", "ours", "why"),
    [
        (("a", "b", "c"), ("a", "b", "c"), None),
        ((), ("a", "b", "c"), None),  # nobody knows
        ((), ("a", "b"), "3 classes there, 2 here"),
        (("a", "b", "c"), ("a", "b", "c", "d"), "3 classes there, 4 here"),
        (("a", "b", "c"), ("a", "c", "b"), "other classes: 2 is 'b' there, 'c' here, 3 is 'c' th"),
    ],
)
def test_outputs_of_other_classes(
    names: tuple[str, ...], ours: tuple[str, ...], why: str | None
) -> None:
    weights = choice(replace(TORCHVISION, num_classes=3), names=names)
    found = weights.other_classes(ours)
    assert found == why if why is None else str(found).startswith(why)
    assert replace(weights, classes=0).other_classes(ours) is None


def test_a_run_fixes_what_its_config_says(kept_run: Path) -> None:
    weights = choose(kept_run, open_origin(kept_run))
    assert weights.title == "checkpoint 00000072-mask of a run of run_v1"
    assert weights.classes == 3
    assert weights.class_names == ("disc", "rectangle", "triangle")
    assert weights.presumed == set()
    assert weights.fields["model.resnet.depth"] == 10
    assert weights.fields["model.fpn_channels"] == 8
    assert weights.fields.keys() == {f"model.{name}" for name in (*RESNET, *HEADS)} | {*IMAGES}
    assert weights.fields["data.shrink"] == "area"  # its config.json is from before there were two


def test_a_cascade_fixes_the_factors_of_its_heads() -> None:
    """By which their outputs are read; where there is none, the config's stay."""
    name = "model.box_head.cascade_box_weights"
    further = {"class_agnostic": True, "cascade": (0.6, 0.7), "cascade_box_weights": (1.5, 2.0)}
    for box_head, known in (({}, None), (further, (1.5, 2.0))):
        model = replace(TORCHVISION, box_head=replace(TORCHVISION.box_head, **box_head))
        origin = Origin(
            "a run",
            model,
            has_heads=True,
            shrink="area",
            class_names=(),
            presumed=frozenset(),
            load=dict,
        )
        assert choose(Path("a"), origin).fields.get(name) == known


def test_a_folder_that_is_no_run_names_the_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "resnet.pth").touch()
    with pytest.raises(
        ConfigError, match=r": holds no checkpoint \(to start from .*/resnet\.pth\)$"
    ):
        open_origin(tmp_path)
    # timm's folders have the name that those of the Hub's layout have.
    safetensors.numpy.save_file({"conv1.weight": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigError,
        match=r"/model\.safetensors: not written by mrcnn_jax \(to .* name the file, not",
    ):
        open_origin(tmp_path)


def test_a_run_that_began_keeps_what_was_chosen() -> None:
    saved = Config(
        data=DataConfig(shrink="bilinear"),
        model=TORCHVISION_V2,
        init_from="w.pth",
        init_without_classes=True,
    )
    config = with_fields(Config(init_from="w.pth"), {"model.rpn.convs": 3, "seed": 5} | NO_NORM)
    again = chosen_before(config, saved, ("seed", "model.rpn.convs"))
    assert again.init_without_classes
    assert again.data.shrink == "bilinear"
    assert chosen_before(config, saved, ("data.shrink",)).data.shrink == "area"
    assert (again.seed, again.model.rpn.convs) == (5, 3)  # refused when it is compared
    assert again.model.box_head.convs == 4
    assert again.model.rpn.samples == config.model.rpn.samples


def test_a_run_of_another_network_gives_nothing() -> None:
    """So that it is told as another run, not by a field that the command did not name."""
    model = replace(TORCHVISION, trunk="convnext")
    config = Config(model=model, init_from="convnext.safetensors")
    assert chosen_before(config, Config(model=DETECTRON2_C4), ("model.trunk",)) == config


NO_NORM = {"model.rpn.batch_norm": False}
