"""The whole path can learn: two real images, all heads together, until their masks are right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mrcnn_jax.commands import eval as evaluation
from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig
from mrcnn_jax.config.model import ModelConfig, ResNetConfig, RoIConfig, RPNConfig
from mrcnn_jax.config.schema import Config, DataConfig, OptimizerConfig, ParamGroup, StageConfig
from mrcnn_jax.training import loop


def _two_images(data_folder: Path, out: Path) -> None:
    """The first two landscape images of coco300's validation split with two to five objects, all of
    medium size or larger, no crowds."""
    source = data_folder / "coco300"
    whole = json.loads((source / "annotations/instances_val.json").read_text())
    chosen = []
    for image in whole["images"]:
        objects = [a for a in whole["annotations"] if a["image_id"] == image["id"]]
        clear = all(a["area"] >= 48**2 and not a["iscrowd"] for a in objects)
        if (
            clear
            and 2 <= len(objects) <= 5
            and image["width"] > image["height"]
            and image["width"] <= 480
        ):
            chosen.append(image)
    chosen = chosen[:2]
    ids = {image["id"] for image in chosen}
    subset = whole | {
        "images": chosen,
        "annotations": [a for a in whole["annotations"] if a["image_id"] in ids],
    }
    (out / "annotations").mkdir(parents=True)
    (out / "images").mkdir()
    for split in ("train", "val"):
        (out / f"annotations/instances_{split}.json").write_text(json.dumps(subset))
    for image in chosen:
        shutil.copy(source / "images" / image["file_name"], out / "images")


@pytest.mark.slow
@pytest.mark.data
def test_two_real_images_are_overfitted(data_folder: Path, optimised: None, tmp_path: Path) -> None:
    data = tmp_path / "data"
    _two_images(data_folder, data)
    everything = tuple(
        ParamGroup(f"{module}/.*") for module in ("resnet", "fpn", "rpn", "box_head", "mask_head")
    )
    config = Config(
        data=DataConfig(
            root=str(data),
            short_side=160,
            long_side=256,
            canvases=((160, 256), (256, 160)),
            max_objects=8,
            max_ignored=1,
        ),
        model=ModelConfig(
            fpn_channels=32,
            resnet=ResNetConfig(depth=10, width=16, norm="live"),
            rpn=RPNConfig(
                scales=(16, 32, 64, 128, 256), samples=64, box_weights=(10.0, 10.0, 5.0, 5.0)
            ),
            roi=RoIConfig(canonical_size=112.0),
            box_head=BoxHeadConfig(hidden=128, box_weights=(10.0, 10.0, 5.0, 5.0)),
            mask_head=MaskHeadConfig(channels=32, samples=12),
        ),
        stages=(
            StageConfig(
                name="joint",
                losses=("rpn", "box", "mask"),
                train=everything,
                optimizer=OptimizerConfig(
                    name="adam", learning_rate=3e-3, schedule="cosine", warmup_steps=20
                ),
                epochs=250,
            ),
        ),
        validate_every_epochs=250,
    )
    loop.train(config, tmp_path / "run")
    metrics = evaluation.run(evaluation.Arguments(workdir=tmp_path / "run", figures=0))
    assert metrics["segm/AP"] > 0.9
    assert metrics["bbox/AP"] > 0.9
