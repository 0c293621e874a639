"""The smallest run that goes the whole way: a config file for `train.py --config tests/tiny.py
--data.root FOLDER`, and its data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig
from mrcnn_jax.config.model import ModelConfig, ResNetConfig, RoIConfig, RPNConfig
from mrcnn_jax.config.schema import Config, DataConfig, OptimizerConfig
from mrcnn_jax.config.tables import staged
from mrcnn_jax.datasets.shapes import write_shapes

TRAIN, VAL = 11, 8  # neither is a multiple of its batch size, and image 7 of a split has no objects
STEPS = 6  # training steps an epoch
STAGES = {"rpn": 2 * STEPS, "box": STEPS, "mask": STEPS}  # steps a stage


def get_config() -> Config:
    adam = OptimizerConfig(name="adam", learning_rate=1e-3, schedule="cosine")
    # Its warm-up is a tenth of the RPN's updates.
    warm = replace(adam, learning_rate=2e-3, warmup_steps=1)
    sgd = OptimizerConfig(name="sgd", learning_rate=0.01, weight_decay=1e-4, clip_norm=1.0)
    return Config(
        name="tiny",
        data=DataConfig(
            short_side=128,
            long_side=128,
            canvases=((128, 128),),
            max_objects=8,
            max_ignored=1,
            mask_crop=28,
            batch_size=2,
            eval_batch_size=3,
        ),
        model=ModelConfig(
            fpn_channels=16,
            resnet=ResNetConfig(depth=10, width=8, norm="live"),
            rpn=RPNConfig(scales=(16, 32, 64, 128, 256), samples=32, pre_nms=50, proposals=16),
            roi=RoIConfig(canonical_size=56.0),
            box_head=BoxHeadConfig(hidden=16, samples=16, score_threshold=0.01, detections=8),
            mask_head=MaskHeadConfig(channels=8, convs=1, samples=4),
        ),
        stages=staged(pretrained=False, epochs=(2, 1, 1), optimizers=(warm, adam, sgd)),
    )


def write_data(root: Path) -> None:
    """Generated shapes under ids that nothing can guess: images from 101 in steps of 7, categories
    5, 7 and 90, annotations from 0."""
    write_shapes(root, train=TRAIN, val=VAL)
    for split in ("train", "val"):
        path = annotations(root, split)
        content = json.loads(path.read_text())
        for image in content["images"]:
            image["id"] = _image_id(image["id"])
        for category in content["categories"]:
            category["id"] = _CATEGORY_IDS[category["id"]]
        for number, annotation in enumerate(content["annotations"]):
            annotation |= {
                "id": number,
                "image_id": _image_id(annotation["image_id"]),
                "category_id": _CATEGORY_IDS[annotation["category_id"]],
            }
        path.write_text(json.dumps(content))


def annotations(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def read(root: Path, split: str) -> dict[str, Any]:
    """The annotation file, parsed."""
    return json.loads(annotations(root, split).read_text())


_CATEGORY_IDS = {1: 5, 2: 7, 3: 90}


def _image_id(number: int) -> int:
    return 94 + 7 * number
