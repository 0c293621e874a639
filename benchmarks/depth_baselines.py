"""How good depth is without looking at the image: what a depth head has to beat.

    python benchmarks/depth_baselines.py --root runs/bins_data [--depth-scale 1000]

Two guesses are fitted to the depth maps of a data set's training images (annotations/, images/ and
`depth_file` as `mrcnn generate` writes them) and compared with those of its validation images:
`median`, one depth for all pixels, and `plane`, the least-squares plane over pixel position. A
JSON line each: the figures of depth that `mrcnn eval` gives (docs/depth.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed

from mrcnn_jax.config.schema import DataConfig  # noqa: E402
from mrcnn_jax.data.reading import read_coco  # noqa: E402
from mrcnn_jax.data.records import CocoDataset, ImageRecord  # noqa: E402
from mrcnn_jax.evaluation.average_precision import match_results  # noqa: E402
from mrcnn_jax.inference.depth_comparison import DepthComparison  # noqa: E402
from mrcnn_jax.pixels.depth import decode_depth  # noqa: E402

EVERY = 4  # pixels along each axis that the guesses are fitted to


def maps(dataset: CocoDataset, data: DataConfig) -> Iterator[tuple[ImageRecord, np.ndarray]]:
    """Each image that has a depth map, with its metres."""
    for image in dataset.images:
        if image.depth_file is not None:
            encoded = (dataset.images_dir / image.depth_file).read_bytes()
            yield (
                image,
                decode_depth(
                    encoded,
                    scale=data.depth_scale,
                    limits=data.depth_range,
                    max_pixels=data.max_pixels,
                ),
            )


def positions(size: tuple[int, int]) -> np.ndarray:
    """[h, w, 3]: 1, and the place of each pixel from the top and the left, in 0..1."""
    y, x = (np.arange(side) / side for side in size)
    return np.stack(np.broadcast_arrays(1.0, y[:, None], x[None]), axis=-1)


def fit(dataset: CocoDataset, data: DataConfig) -> tuple[float, np.ndarray]:
    """The median depth, and the coefficients of the plane."""
    values, products, sums = [], np.zeros((3, 3)), np.zeros(3)
    for _, metres in maps(dataset, data):
        places, metres = positions(metres.shape)[::EVERY, ::EVERY], metres[::EVERY, ::EVERY]
        known = metres > 0
        values.append(metres[known])
        rows = places[known]
        products += rows.T @ rows
        sums += rows.T @ metres[known]
    return float(np.median(np.concatenate(values))), np.linalg.solve(products, sums)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--depth-scale", type=float, default=DataConfig.depth_scale)
    arguments = parser.parse_args()
    data = DataConfig(depth_scale=arguments.depth_scale)
    train, val = (
        read_coco(
            arguments.root / "annotations" / f"instances_{split}.json",
            arguments.root / "images",
            data,
            depth=True,
        )
        for split in ("train", "val")
    )
    median, plane = fit(train, data)
    nothing = match_results(val.to_coco(), [], iou_types=("segm",))["segm"]
    for name in ("median", "plane"):
        compared = DepthComparison()
        for index, (image, true) in enumerate(maps(val, data)):
            guess = (
                positions(true.shape) @ plane if name == "plane" else np.full(true.shape, median)
            )
            compared.add(index, image, guess, true)
        figures = compared.figures(list(enumerate(val.images)), [], nothing)
        print(json.dumps({"guess": name, **{k: round(v, 4) for k, v in figures.items()}}))


if __name__ == "__main__":
    main()
