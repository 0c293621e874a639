"""The data sets of a run are refused where they do not fit it or each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.heads import DepthHeadConfig, MaskIoUHeadConfig
from mrcnn_jax.config.optional_heads import following_heads, with_depth
from mrcnn_jax.config.schema import Config
from mrcnn_jax.training import loop
from mrcnn_jax.training import open as opening


def with_maps(config: Config, folder: Path, *splits: str, metres: float = 0.8) -> Config:
    """`config` with a constant depth map for each image of `splits`, under the images' names."""
    data = config.data
    for split in splits:
        place = folder / f"{split}_depth"
        place.mkdir(parents=True)
        for image in tiny.read(Path(str(data.root)), split)["images"]:
            stem = Path(image["file_name"]).stem
            depth = np.full((image["height"], image["width"]), metres, np.float32)
            np.save(place / f"{stem}.npy", depth)
        data = replace(data, **{f"{split}_depth": str(place)})
    return replace(config, data=data)


def without_masks(config: Config, folder: Path, categories: set[int]) -> Config:
    """`config` with training objects of some categories that have boxes alone."""
    content = tiny.read(Path(str(config.data.root)), "train")
    for annotation in content["annotations"]:
        if annotation["category_id"] in categories:
            del annotation["segmentation"]
    path = folder / f"boxes{len(categories)}.json"
    path.write_text(json.dumps(content))
    return replace(config, data=replace(config.data, train_annotations=str(path)))


def test_a_depth_loss_needs_depth(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For both files, before anything is compiled; a depth head that no stage trains needs none."""
    head = DepthHeadConfig(kind="dense", channels=8)
    config = replace(
        tiny_config,
        model=replace(tiny_config.model, depth_head=head),
        stages=with_depth(tiny_config.stages, epochs=1),
    )

    def refused(config: Config) -> str:
        with pytest.raises(ConfigError) as error, opening.open_run(config, tmp_path / "run"):
            pass
        return str(error.value).replace(f"{tiny_config.data.root}/annotations/", "")

    hint = "no depth for the loss depth: none of its images has a depth_file: write these, or give"
    names = "a folder of depth maps with the images' names"
    assert refused(config) == f"instances_train.json: {hint} data.train_depth, {names}"
    half = with_maps(config, tmp_path, "train")
    assert refused(half) == f"instances_val.json: {hint} data.val_depth, {names}"
    other = replace(half, data=replace(half.data, val_depth=half.data.root))
    assert refused(other) == (
        f"instances_val.json: no depth for the loss depth: data.val_depth: {half.data.root} has no "
        ".png or .npy with the name of an image"
    )
    unknown = with_maps(config, tmp_path / "unknown", "train", "val", metres=0)
    assert refused(unknown) == (
        "instances_train.json: no depth for the loss depth: not one pixel of its 11 depth maps is "
        "known"
    )

    whole = with_maps(half, tmp_path / "more", "val")
    roi = replace(whole.model, depth_head=replace(head, kind="roi"))
    boxes = without_masks(whole, tmp_path, {5, 7, 90})
    assert refused(replace(boxes, model=roi)) == (
        f"{boxes.data.train_annotations}: no depth for the loss depth: a head of the kind roi "
        "learns from objects with a mask, and there is none: --model.depth-head.kind dense needs "
        "none"
    )
    capsys.readouterr()
    with opening.open_run(whole, tmp_path / "run") as run:
        assert run.train_split.dataset.has_depth
        assert run.val_split.dataset.has_depth
    line = "100.0% of their pixels known, 0.8 to 0.8 m (quantiles 1% 0.8, 50% 0.8, 99% 0.8)"
    assert [line for line in capsys.readouterr().out.splitlines() if "depth" in line] == [
        f"depth: {count} of {count} images; {line}" for count in (tiny.TRAIN, tiny.VAL)
    ]
    without = replace(config, stages=config.stages[:-1])
    with opening.open_run(without, tmp_path / "run") as run:
        assert not run.train_split.dataset.has_depth


def test_masks_of_a_class_that_has_none_would_stay_random(
    tiny_config: Config, tiny_run: Path, tmp_path: Path
) -> None:
    config = without_masks(tiny_config, tmp_path, {7})
    with pytest.raises(ConfigError) as error, opening.open_run(config, tmp_path / "run"):
        pass
    (name,) = (
        c["name"] for c in tiny.read(Path(str(config.data.root)), "train")["categories"][1:2]
    )
    assert str(error.value) == (
        f"{config.data.train_annotations}: {name}: only boxes, no mask to learn from: "
        "--model.mask-head.class-agnostic learns one mask for all classes"
    )
    head = replace(config.model.mask_head, class_agnostic=True)
    agnostic = replace(config, model=replace(config.model, mask_head=head))
    untrained = replace(config, stages=config.stages[:2])
    of_iou = MaskIoUHeadConfig(True, channels=4, fcs=1, hidden=8)
    model = replace(config.model, mask_iou_head=of_iou)
    scored = following_heads(replace(config, model=model, init_from=str(tiny_run)))
    with pytest.raises(ConfigError, match="only boxes"), opening.open_run(scored, tmp_path / "s"):
        pass  # their outputs per class would be random, though the masks' are not
    loaded = replace(config, init_from=str(tiny_run))
    for number, known in enumerate((agnostic, untrained, loaded)):
        with opening.open_run(known, tmp_path / f"run{number}") as run:
            assert run.has_masks


def test_categories_of_both_files_are_compared_before_anything_is_built(
    tiny_config: Config, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids that differ are matched by name, which the report says; other names end it."""
    content = tiny.read(tiny_data, "val")
    path = tmp_path / "val.json"

    def split_of(categories: list[dict[str, Any]]) -> Any:
        path.write_text(json.dumps(content | {"categories": categories}))
        data = replace(tiny_config.data, val_annotations=str(path), cache=str(tmp_path / "cache"))
        with opening.open_run(replace(tiny_config, data=data), tmp_path / "run") as run:
            return run.val_split

    (tmp_path / "run").mkdir()
    kept = split_of(content["categories"])
    # The same file with ids 2, 1, 0 instead of 5, 7, 90.
    ids = {category["id"]: 2 - place for place, category in enumerate(content["categories"])}
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
    renumbered = [{**c, "id": ids[c["id"]]} for c in content["categories"]]
    capsys.readouterr()
    matched = split_of(renumbered)
    assert matched.dataset.images == kept.dataset.images
    assert matched.dataset.to_coco() == kept.dataset.to_coco()
    labels = [
        [list(split.source[i]["objects"]["label"]) for i in range(len(split.source))]
        for split in (matched, kept)
    ]
    assert labels[0] == labels[1]
    printed = capsys.readouterr().out
    assert "repaired 3: categories with other ids in" in printed
    assert printed.count("labels follow their order") == 1  # in the training file

    built = sorted((tmp_path / "cache").iterdir())
    renumbered[0]["name"] = "circle"
    with pytest.raises(
        ConfigError, match=r"val.json: categories that \S+ does not have: 2 'circle'"
    ):
        split_of(renumbered)
    content["annotations"] = []
    with pytest.raises(ConfigError, match=r"val.json: 'categories' lacks 'disc' of \S+"):
        split_of(renumbered[1:])
    assert sorted((tmp_path / "cache").iterdir()) == built


def test_a_training_file_without_objects_is_refused(
    tiny_config: Config, tiny_data: Path, tmp_path: Path
) -> None:
    content = tiny.read(tiny_data, "train")
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    config = replace(tiny_config, data=replace(tiny_config.data, train_annotations=str(path)))
    with pytest.raises(ConfigError, match=r"train.json: no object to train on: all its \d+ anno"):
        loop.train(config, tmp_path / "run")


def test_validation_images_that_are_trained_on_are_noticed(
    tiny_config: Config, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(
        tiny_config,
        data=replace(tiny_config.data, val_annotations=str(tiny.annotations(tiny_data, "train"))),
    )
    with opening.open_run(config, tmp_path / "run"):
        pass
    assert f"noticed {tiny.TRAIN}: images that are in " in capsys.readouterr().out
