"""Images a second of the input pipeline, ours beside torchvision's reference one: decode, masks,
resize, batch.

    python benchmarks/input_pipeline.py [--images 64] [--objects 8] [--cores 1]

Both read the same generated JPEGs (480 x 640) with polygons, and make batches of 2 on a canvas of
short side 800. torchvision's does what its references/detection and its model do: Pillow, polygons
to full masks (pycocotools), then images and masks resized with torch.nn.functional.interpolate.
Ours: records (checked and built before, not timed), decode, resize, 112 x 112 crops of the masks,
on as many threads as cores. Needs no data set; without torch, ours is timed alone. The last line is
JSON: seconds, `images_per_second`, `ratio`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sides

SIZE = (480, 640)
BATCH = 2


def write_data(folder: Path, arguments: argparse.Namespace) -> None:
    """Images and instances.json: ellipses as polygons of 40 corners before waves."""
    from parity.seeded import seeded_scene
    from PIL import Image

    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    (folder / "images").mkdir()
    images, annotations = [], []
    for number in range(1, arguments.images + 1):
        pixels, truth = seeded_scene(SIZE, arguments.objects, 4, seed=number)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg", quality=90)
        images.append(
            {"id": number, "file_name": f"{number}.jpg", "height": SIZE[0], "width": SIZE[1]}
        )
        for box, label in zip(truth["boxes"].astype(float), truth["labels"], strict=True):
            centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
            polygon = (
                (centre + half * np.stack([np.cos(angles), np.sin(angles)], axis=1))
                .ravel()
                .round(2)
                .tolist()
            )
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": int(label),
                "iscrowd": 0,
            }
            bbox = [*box[:2].tolist(), *(2 * half).tolist()]
            annotations.append(
                annotation
                | {"bbox": bbox, "area": float(np.pi * half.prod()), "segmentation": [polygon]}
            )
    categories = [{"id": i, "name": f"class {i}"} for i in (1, 2, 3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


def ours(arguments: argparse.Namespace) -> sides.Side:
    from mrcnn_jax.config.schema import DataConfig
    from mrcnn_jax.data.loader import load, open_split, plan_once
    from mrcnn_jax.data.reading import read_coco

    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    write_data(root, arguments)
    data = DataConfig(batch_size=BATCH, threads=arguments.cores)
    dataset = read_coco(root / "instances.json", root / "images", data)
    split = open_split("train", dataset, cache=root / "cache", data=data)
    plan = plan_once(split, BATCH)

    def run(folder: Any = folder) -> None:  # keeps the folder alive
        assert sum(int(batch.valid.sum()) for batch in load(split, plan, data)) == arguments.images

    return sides.Side({"load": run})


def torchvision(arguments: argparse.Namespace) -> sides.Side:
    import torch
    from PIL import Image
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from torchvision.transforms.functional import pil_to_tensor

    torch.set_num_threads(arguments.cores)
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    write_data(root, arguments)
    coco = COCO(str(root / "instances.json"))
    resize = GeneralizedRCNNTransform(800, 1333, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    resize.train()

    def example(number: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        record = coco.loadImgs(number)[0]
        found = coco.loadAnns(coco.getAnnIds(number))
        masks = []
        for annotation in found:
            parts = coco_mask.frPyObjects(
                annotation["segmentation"], record["height"], record["width"]
            )
            mask = torch.as_tensor(coco_mask.decode(parts), dtype=torch.uint8)
            masks.append(mask.any(dim=2))
        boxes = torch.as_tensor([annotation["bbox"] for annotation in found], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([annotation["category_id"] for annotation in found])
        pixels = (
            pil_to_tensor(Image.open(root / "images" / record["file_name"]).convert("RGB")).float()
            / 255
        )
        return pixels, {
            "boxes": boxes,
            "labels": labels,
            "masks": torch.stack(masks).to(torch.uint8),
        }

    def run(folder: Any = folder) -> None:
        numbers = coco.getImgIds()
        for start in range(0, len(numbers), BATCH):
            examples = [example(number) for number in numbers[start : start + BATCH]]
            resize([image for image, _ in examples], [target for _, target in examples])

    return sides.Side({"load": run})


SIDES = {sides.OURS: ours, "torchvision": torchvision}


def main() -> None:
    parser = sides.parser(__doc__, rounds=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--objects", type=int, default=8, help="in each image")
    parser.add_argument("--cores", type=int, default=1)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])  # of the sides too
    times = sides.compare(SIDES, arguments)
    result = sides.machine(arguments, ["images", "objects"])
    if sides.OURS in times:
        row = sides.ratios(times, "load")
        rates = {
            name.replace("_seconds", ""): round(arguments.images / row[name], 1)
            for name in row
            if name.endswith("_seconds")
        }
        result |= row | {"images_per_second": rates}
    print(json.dumps(result | {"facts": {name: t.facts for name, t in times.items()}}))


if __name__ == "__main__":
    main()
