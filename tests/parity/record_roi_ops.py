"""Records torchvision's RoI operations for tests/ops/test_roi.py; needs torchvision.

PYTHONPATH=.:tests python tests/parity/record_roi_ops.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from roi_cases import CONFIGS, RECORDED, SIZE, STRIDES, TORCHVISION, Case, case

from mrcnn_jax.config.model import RoIConfig


def torchvisions(
    case: Case, config: RoIConfig, size: int, strides: Sequence[int] = STRIDES
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(features of the boxes, gradients of the maps for the case's cotangent), each in our
    layout."""
    import torch
    from torchvision.ops import roi_align, roi_pool

    maps = [torch.from_numpy(f).permute(2, 0, 1)[None].requires_grad_() for f in case.features]
    pooled = torch.zeros(len(case.boxes), maps[0].shape[1], size, size)
    for level, (feature, stride) in enumerate(zip(maps, strides, strict=True)):
        rows = torch.from_numpy(case.levels == level)
        boxes = [torch.from_numpy(case.boxes)[rows]]
        if config.op == "pool":
            pooled[rows] = roi_pool(feature, boxes, size, 1 / stride)
        else:
            pooled[rows] = roi_align(
                feature, boxes, size, 1 / stride, config.sampling_ratio or -1, config.aligned
            )
    pooled.backward(torch.from_numpy(case.cotangent).permute(0, 3, 1, 2))
    gradients = [
        feature.grad[0].permute(1, 2, 0).numpy() for feature in maps if feature.grad is not None
    ]
    return pooled.detach().permute(0, 2, 3, 1).numpy(), gradients


if __name__ == "__main__":
    recorded = {}
    for name in TORCHVISION:
        pooled, gradients = torchvisions(case(0), CONFIGS[name], SIZE)
        recorded |= {name: pooled} | {
            f"{name}/gradient{level}": gradient for level, gradient in enumerate(gradients)
        }
    np.savez_compressed(RECORDED, **recorded)
    print(f"{RECORDED}: {RECORDED.stat().st_size} bytes")
