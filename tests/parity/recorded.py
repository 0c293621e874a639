"""The recorded case (record.py): seeded weights, two generated images, a quick ResNet-18."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from parity import seeded

FOLDER = Path(__file__).parent.parent / "recorded"
DEPTH = 18
SEED = (
    7  # of the weights: no detection lies near a cut, where another machine might decide otherwise
)
CLASSES = 41  # with the background
PROPOSALS = {"test": 200, "train": 100}
DETECTIONS = 50
SIZES = (
    (160, 224),
    (160, 200),
)  # the canvas is 160 x 224, where the anchors of P6 are 53 and 56 pixels apart
MASKS = 10  # detections of each image whose masks are recorded
LEVELS = 65535  # probabilities are recorded as uint16


def file(version: str) -> Path:
    return FOLDER / f"torchvision_{version}.npz"


def scenes() -> tuple[list[np.ndarray], list[dict[str, np.ndarray]]]:
    """Images and their ground truth."""
    both = [
        seeded.seeded_scene(size, objects=6, classes=CLASSES, seed=seed)
        for seed, size in enumerate(SIZES)
    ]
    return [image for image, _ in both], [truth for _, truth in both]


def shapes(numbers: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the peer's state dict."""
    return {
        name: tuple(map(int, shape.split()))
        for name, shape in zip(numbers["names"], numbers["shapes"], strict=True)
    }


def training_tensors(
    shapes: Mapping[str, tuple[int, ...]], settled: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Weights of the backward pass; `settled` replaces `settled_names`, one after the other."""
    tensors = seeded.seeded_tensors(shapes, SEED, seeded.TRAINING_GAINS)
    if settled is not None:
        names = settled_names(shapes)
        ends = np.cumsum([np.prod(shapes[name], dtype=int) for name in names])[:-1]
        tensors |= {
            name: values.astype(np.float32)
            for name, values in zip(names, np.split(settled, ends), strict=True)
        }
    return tensors


def settled_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The parameters that `peers.settle_gates` changes."""
    return [name for name in shapes if name.endswith((".bias", ".running_mean", ".running_var"))]


def samples(values: np.ndarray, count: int = 512) -> np.ndarray:
    """Some `count` elements at even distances; odd ones, so that all channels have their turn."""
    return values.ravel()[:: max(1, values.size // count) | 1]


def quantised(probabilities: np.ndarray) -> np.ndarray:
    return np.round(probabilities * LEVELS).astype(np.uint16)


def probabilities(quantised: np.ndarray) -> np.ndarray:
    return (quantised / LEVELS).astype(np.float32)
