"""Weights and images that NumPy alone can make again, where there is no torch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

# Standard deviation of the output layers' weights, as a multiple of He et al. 2015's: so large that
# scores differ from box to box, and so small that float32 rounding in front of them stays far below
# the bounds of the comparison.
GAINS = {
    "backbone.fpn.inner_blocks.3.0": 3.0,
    "rpn.head.cls_logits": 0.5,
    "rpn.head.bbox_pred": 0.05,
    "roi_heads.box_head.fc7": 0.5,
    "roi_heads.box_predictor.cls_score": 2.0,
    "roi_heads.box_predictor.bbox_pred": 1.0,
    "roi_heads.mask_predictor.mask_fcn_logits": 1.0,
}
# Without it, softmax over 91 classes leaves no proposal to the background, and no score is near the
# threshold.
BACKGROUND_BIAS = 17.0
# For gradients: laterals that make up for the residual sums of `peers.settle_gates`, which have no
# ReLU that closes.
TRAINING_GAINS = GAINS | {f"backbone.fpn.inner_blocks.{i}.0": 0.1 for i in range(4)}


def seeded_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int, gains: Mapping[str, float] = GAINS
) -> dict[str, np.ndarray]:
    """Draws a float32 tensor for each name of a state dict from name, shape and `seed` alone.

    Convolutions and fully connected layers: normal, by fan in (He et al. 2015), without a mean over
    the fan in, so that the mean of non-negative inputs does not drown what tells them apart. Batch
    norm: means, variances, scales and shifts that all matter.
    """
    return {name: _tensor(name, tuple(shape), seed, gains) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...], seed: int, gains: Mapping[str, float]) -> np.ndarray:
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    layer, kind = name.rsplit(".", 1)
    if kind == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if kind == "running_var":
        return random.uniform(0.5, 2.0, shape).astype(np.float32)
    if kind in ("running_mean", "bias"):
        values = random.normal(0.0, 0.1, shape).astype(np.float32)
        if name == "roi_heads.box_predictor.cls_score.bias":
            values[0] += BACKGROUND_BIAS
        return values
    if len(shape) == 1:
        # The last norm of a residual block: small, or the sum would grow from block to block.
        low, high = (0.1, 0.4) if layer.endswith(".bn2") else (0.5, 1.5)
        return random.uniform(low, high, shape).astype(np.float32)
    into = (
        (0,) if layer.endswith("conv5_mask") else tuple(range(1, len(shape)))
    )  # transposed: [in, out, y, x]
    weight = random.standard_normal(shape, np.float32)
    weight -= weight.mean(into, keepdims=True)
    fan_in = np.prod([shape[axis] for axis in into])
    return weight * np.float32(gains.get(layer, 1.0) * np.sqrt(2.0 / fan_in))


def unfolded_norms(
    tensors: Mapping[str, np.ndarray], epsilon: float, seed: int
) -> dict[str, np.ndarray]:
    """The same ResNet with running means and variances other than 0 and 1: epsilon matters."""
    unfolded = dict(tensors)
    for name in tensors:
        if not name.endswith(".running_var"):
            continue
        norm = name.removesuffix(".running_var")
        random = np.random.default_rng([seed, zlib.crc32(norm.encode())])
        scale, bias = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
        factor = scale / np.sqrt(tensors[name] + epsilon)
        shift = bias - tensors[f"{norm}.running_mean"] * factor
        variance = np.exp(random.uniform(np.log(1e-3), np.log(1e-1), scale.shape)).astype(
            np.float32
        )
        mean = (random.normal(0.0, 0.3, scale.shape) * np.sqrt(variance)).astype(np.float32)
        unfolded |= {
            f"{norm}.weight": (factor * np.sqrt(variance + epsilon)).astype(np.float32),
            f"{norm}.bias": (shift + mean * factor).astype(np.float32),
            f"{norm}.running_mean": mean,
            name: variance,
        }
    return unfolded


def seeded_scene(
    size: tuple[int, int], objects: int, classes: int, seed: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A uint8 image [H, W, 3] of ellipses before a pattern of several scales, and its ground truth.

    Ground truth: boxes float32 [N, 4] that bound the ellipses, labels int64 [N] of 1..classes - 1,
    masks uint8 [N, H, W].
    """
    random = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width] + 0.5
    image = random.normal(0.0, 12.0, (height, width, 3))
    for _ in range(12):
        frequency, phase = random.normal(0.0, 0.12, 2), random.uniform(0, 2 * np.pi)
        image += (
            random.normal(0.0, 15.0, 3)
            * np.sin(frequency[0] * y + frequency[1] * x + phase)[..., None]
        )
    boxes, masks = [], []
    for _ in range(objects):
        half = np.exp(random.uniform(np.log(8), np.log(min(size) / 3), 2))
        centre = random.uniform(half, np.array([width, height]) - half)
        inside = ((x - centre[0]) / half[0]) ** 2 + ((y - centre[1]) / half[1]) ** 2 < 1
        image[inside] = 0.5 * image[inside] + random.normal(0.0, 70.0, 3)
        boxes.append([*(centre - half), *(centre + half)])
        masks.append(inside)
    truth = {
        "boxes": np.array(boxes, np.float32),
        "labels": random.integers(1, classes, objects),
        "masks": np.array(masks, np.uint8),
    }
    return (image + 128).clip(0, 255).astype(np.uint8), truth
