"""Times single operations, ours beside torchvision's.

    python benchmarks/ops.py [--canvas 800 1088] [--boxes 512] [--channels 256]

Both get the same inputs, made by NumPy. RoIAlign, without and with its gradient, reads P2..P5 of
one image, each box from its level, in 7 x 7 bins of 2 x 2 samples; NMS takes 2000 boxes; proposals
go from logits and deltas of all anchors to 1000 boxes; 100 masks are pasted into an image
(paste_rle: and encoded as COCO's run lengths). Ours run on JAX's device, except for pasting, in
NumPy on the host. Needs no data set; without torch, ours are timed alone. The last line is JSON:
medians of each operation in seconds, and `ratio` (above 1: ours is faster).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import sides

STRIDES = (4, 8, 16, 32)
NMS_BOXES = 2000
MASKS = 100


class Inputs(NamedTuple):
    """Arrays of all operations, float32."""

    maps: list[np.ndarray]  # [h, w, c]
    boxes: np.ndarray  # [n, 4]
    cotangent: np.ndarray  # [n, 7, 7, c]
    nms_boxes: np.ndarray
    nms_scores: np.ndarray
    logits: np.ndarray  # [anchors]
    deltas: np.ndarray  # [anchors, 4]
    masks: np.ndarray  # [m, 28, 28]


def inputs(arguments: argparse.Namespace) -> Inputs:
    rng = np.random.default_rng(0)
    height, width = arguments.canvas

    def boxes(count: int) -> np.ndarray:
        side = np.exp(
            rng.uniform(np.log(16), np.log(min(height, width) * 0.9), (count, 1))
        ) * np.exp(rng.uniform(-0.35, 0.35, (count, 2)))
        centre = rng.uniform(0, 1, (count, 2)) * [width, height]
        corners = np.concatenate([centre - side / 2, centre + side / 2], axis=1)
        return np.clip(corners, 0, [width, height, width, height]).astype(np.float32)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    grids = [(-(-height // stride), -(-width // stride)) for stride in (*STRIDES, 64)]
    anchors = 3 * sum(h * w for h, w in grids)
    return Inputs(
        maps=[normal(*grid, arguments.channels) for grid in grids[:4]],
        boxes=boxes(arguments.boxes),
        cotangent=normal(arguments.boxes, 7, 7, arguments.channels),
        nms_boxes=boxes(NMS_BOXES),
        nms_scores=rng.permutation(NMS_BOXES).astype(np.float32),
        logits=normal(anchors),
        deltas=0.3 * normal(anchors, 4),
        masks=rng.uniform(0, 1, (MASKS, 28, 28)).astype(np.float32),
    )


def ours(arguments: argparse.Namespace) -> sides.Side:
    import jax
    import jax.numpy as jnp

    from mrcnn_jax.config.tables import TORCHVISION
    from mrcnn_jax.models.rpn import RPNOutput, pyramid_anchors, rpn_proposals
    from mrcnn_jax.ops.nms import nms
    from mrcnn_jax.ops.roi import assign_levels, roi_align
    from mrcnn_jax.pixels.geometry import paste
    from mrcnn_jax.pixels.rle import paste_rle
    from mrcnn_jax.runtime import compile_options

    given = inputs(arguments)
    canvas = tuple(arguments.canvas)
    on_device = jax.device_put(given)

    def align(maps: list[jax.Array], boxes: jax.Array) -> jax.Array:
        levels = (
            assign_levels(boxes, canonical_size=224.0, canonical_level=4, min_level=2, max_level=5)
            - 2
        )
        there = jnp.ones(len(boxes), bool)
        return roi_align(
            maps,
            boxes,
            there,
            levels=levels,
            strides=STRIDES,
            output_size=7,
            sampling_ratio=2,
            aligned=False,
        )

    def align_gradient(
        maps: list[jax.Array], boxes: jax.Array, cotangent: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        pooled, vjp = jax.vjp(lambda maps: align(maps, boxes), maps)
        return pooled, vjp(cotangent)[0]

    config = replace(TORCHVISION.rpn, scales=(32, 64, 128, 256, 512))
    anchors = pyramid_anchors(config, canvas, (*STRIDES, 64))
    size = jnp.array(canvas, jnp.int32)
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "roi_align": (align, (on_device.maps, on_device.boxes)),
        "roi_align_with_gradient": (
            align_gradient,
            (on_device.maps, on_device.boxes, on_device.cotangent),
        ),
        "nms_2000": (
            lambda boxes, scores: nms(
                boxes, scores, jnp.ones(NMS_BOXES, bool), iou_threshold=0.7, max_output=NMS_BOXES
            ),
            (on_device.nms_boxes, on_device.nms_scores),
        ),
        "proposals": (
            lambda logits, deltas: rpn_proposals(
                RPNOutput(logits=logits, deltas=deltas), anchors, size, config
            ),
            (on_device.logits, on_device.deltas),
        ),
    }
    runs: dict[str, Callable[[], object]] = {}
    for name, (function, values) in programs.items():
        program = jax.jit(function, **compile_options())
        runs[name] = lambda program=program, values=values: jax.block_until_ready(program(*values))
    boxes = given.boxes[:MASKS]
    runs["paste"] = lambda: [
        paste(mask, box, canvas, "torchvision")
        for mask, box in zip(given.masks, boxes, strict=True)
    ]
    runs["paste_rle"] = lambda: [
        paste_rle(mask, box, canvas, "torchvision")
        for mask, box in zip(given.masks, boxes, strict=True)
    ]
    return sides.Side(runs, {"device": jax.devices()[0].device_kind})


def torchvision(arguments: argparse.Namespace) -> sides.Side:
    import torch
    from parity import peers
    from pycocotools import mask as coco_mask
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.roi_heads import paste_masks_in_image
    from torchvision.ops import MultiScaleRoIAlign, nms

    given = inputs(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensor = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    sizes = [tuple(arguments.canvas)]
    maps = {
        str(i): tensor(level.transpose(2, 0, 1)[None].copy()).requires_grad_()
        for i, level in enumerate(given.maps)
    }
    boxes, cotangent = tensor(given.boxes), tensor(given.cotangent.transpose(0, 3, 1, 2).copy())
    pool = MultiScaleRoIAlign(list(maps), output_size=7, sampling_ratio=2)
    scores, nms_boxes = tensor(given.nms_scores), tensor(given.nms_boxes)

    model = peers.build("v1").to(device)
    grids = [(-(-sizes[0][0] // stride), -(-sizes[0][1] // stride)) for stride in (*STRIDES, 64)]
    counts = [3 * h * w for h, w in grids]
    images = ImageList(torch.zeros(1, 3, *sizes[0], device=device), sizes)
    features = [torch.zeros(1, 1, *grid, device=device) for grid in grids]
    logits, deltas = tensor(given.logits), tensor(given.deltas)

    def with_gradient() -> None:
        pooled = pool(maps, [boxes], sizes)
        torch.autograd.grad(pooled, list(maps.values()), cotangent)
        finish()

    def forward() -> None:
        with torch.no_grad():
            pool(maps, [boxes], sizes)
        finish()

    def proposals() -> None:
        with torch.no_grad():
            anchors = model.rpn.anchor_generator(images, features)
            decoded = model.rpn.box_coder.decode(deltas, anchors).view(1, -1, 4)
            model.rpn.filter_proposals(decoded, logits[:, None], sizes, counts)
        finish()

    def suppress() -> None:
        nms(nms_boxes, scores, 0.7)
        finish()

    masks = tensor(given.masks[:, None])

    def paste() -> torch.Tensor:
        pasted = paste_masks_in_image(masks, boxes[:MASKS], sizes[0])
        finish()
        return pasted

    def paste_rle() -> None:
        binary = (paste()[:, 0] > 0.5).cpu().numpy().astype(np.uint8)
        for mask in binary:
            coco_mask.encode(np.asfortranarray(mask))

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    runs = {
        "roi_align": forward,
        "roi_align_with_gradient": with_gradient,
        "nms_2000": suppress,
        "proposals": proposals,
        "paste": paste,
        "paste_rle": paste_rle,
    }
    return sides.Side(runs)


SIDES = {sides.OURS: ours, "torchvision": torchvision}


def main() -> None:
    parser = sides.parser(__doc__, rounds=10)
    parser.add_argument(
        "--canvas", type=int, nargs=2, default=[800, 1088], metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--boxes", type=int, default=512)
    parser.add_argument("--channels", type=int, default=256)
    arguments = parser.parse_args()
    times = sides.compare(SIDES, arguments)
    result = sides.machine(arguments, ["canvas", "boxes", "channels"])
    if sides.OURS in times:
        result["ops"] = {run: sides.ratios(times, run) for run in times[sides.OURS].seconds}
    print(json.dumps(result | {"facts": {name: t.facts for name, t in times.items()}}))


if __name__ == "__main__":
    main()
