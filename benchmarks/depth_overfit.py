"""Overfits the dense depth head to a few photographs of real rooms with depth.

    python benchmarks/depth_overfit.py [--images 4] [--epochs 400] [--loss silog]

Reads sunrgbd30 (30 images of SUN RGB-D with depth maps, 16-bit PNG at 8000 a metre) and ResNet-18
weights from $MRCNN_DATA, trains the FPN and the depth head on a frozen ResNet, and evaluates on the
same images. Prints one JSON line: the figures of depth that `mrcnn eval` gives (docs/depth.md),
those of pixels alone, and `seconds` of training. Exit status 0 if AbsRel is under .03.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed

from mrcnn_jax.config.heads import DepthHeadConfig  # noqa: E402
from mrcnn_jax.config.model import ModelConfig, ResNetConfig  # noqa: E402
from mrcnn_jax.config.schema import (  # noqa: E402
    Config,
    DataConfig,
    OptimizerConfig,
    ParamGroup,
    StageConfig,
)

GOAL = 0.03


def write_annotations(source: Path, path: Path, count: int) -> None:
    """The first training images with their filled depth maps, each as one object."""
    maps = sorted((source / "train_depth").iterdir())
    images: list[dict[str, Any]] = []
    for number, file in enumerate(sorted((source / "train" / "color").iterdir())[:count], 1):
        with Image.open(file) as image:
            width, height = image.size
        depth = os.path.relpath(maps[number - 1], file.parent)
        size = {"height": height, "width": width}
        images.append({"id": number, "file_name": file.name, "depth_file": depth} | size)
    annotations = [
        {
            "id": image["id"],
            "image_id": image["id"],
            "category_id": 1,
            "bbox": [0, 0, image["width"], image["height"]],
            "area": image["width"] * image["height"],
            "iscrowd": 0,
        }
        for image in images
    ]
    categories = [{"id": 1, "name": "room"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))


def config_of(annotations: Path, images: Path, weights: Path, epochs: int, loss: Any) -> Config:
    heads = tuple(f"{head}/.*" for head in ("resnet", "rpn", "box_head", "mask_head"))
    return Config(
        name="depth_overfit",
        data=DataConfig(
            train_annotations=str(annotations),
            val_annotations=str(annotations),
            train_images=str(images),
            val_images=str(images),
            depth_scale=8000.0,
            short_side=256,
            long_side=384,
            canvases=((256, 384), (384, 256)),
        ),
        model=ModelConfig(
            num_classes=1,
            fpn_channels=128,
            resnet=ResNetConfig(depth=18),
            depth_head=DepthHeadConfig("dense", loss=loss),
        ),
        stages=(
            StageConfig(
                name="depth",
                losses=("depth",),
                train=(ParamGroup("fpn/.*"), ParamGroup("depth_head/.*")),
                frozen=heads,
                optimizer=OptimizerConfig(
                    name="adam", learning_rate=1e-3, schedule="cosine", clip_norm=1.0
                ),
                epochs=epochs,
            ),
        ),
        init_from=str(weights),
        validate_every_epochs=epochs,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--loss", choices=("silog", "berhu", "l1"), default="silog")
    arguments = parser.parse_args()

    from mrcnn_jax.inference.evaluate import evaluate
    from mrcnn_jax.inference.predictor import Predictor
    from mrcnn_jax.runs.run import load_run, open_data
    from mrcnn_jax.training.loop import train

    shared = Path(os.environ["MRCNN_DATA"])
    with tempfile.TemporaryDirectory() as folder:
        annotations, workdir = Path(folder, "rooms.json"), Path(folder, "run")
        write_annotations(shared / "sunrgbd30", annotations, arguments.images)
        config = config_of(
            annotations,
            shared / "sunrgbd30" / "train" / "color",
            shared / "weights" / "pqf_resnet18_small.npz",
            arguments.epochs,
            arguments.loss,
        )
        begun = time.perf_counter()
        train(config, workdir)
        seconds = time.perf_counter() - begun
        run = load_run(workdir)
        found = evaluate(Predictor(run), open_data(run, workdir, "train"))
    assert found is not None
    figures = {k: round(v, 4) for k, v in found.metrics.items() if k.startswith("depth/")}
    result = {"images": arguments.images, "epochs": arguments.epochs, "loss": arguments.loss}
    print(json.dumps(result | figures | {"seconds": round(seconds)}))
    sys.exit(figures["depth/AbsRel"] >= GOAL)


if __name__ == "__main__":
    main()
