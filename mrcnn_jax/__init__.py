"""Mask R-CNN in JAX and Flax: staged training on COCO-format data.

import mrcnn_jax
found = mrcnn_jax.load("runs/a").predict(image)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrcnn_jax.inference.api import Detections, Model, load, video_frames

__version__ = "0.2.0"
__all__ = ["Detections", "Model", "load", "video_frames"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Late: importing jax takes seconds, and a command's typo should not wait for it.
    from mrcnn_jax.inference import api

    return getattr(api, name)
