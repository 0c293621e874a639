"""Records masks pasted by torchvision for tests/pixels/test_geometry.py.

python tests/parity/record_paste.py      # needs torchvision
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

RECORDED = Path(__file__).parent.parent / "recorded" / "paste.npz"
SIZE = (24, 31)
BOXES = [
    (3.0, 4.0, 17.0, 15.0),
    (2.3, 5.7, 29.6, 20.1),
    (0.0, 0.0, 31.0, 24.0),  # the image
    (-6.5, -3.2, 12.4, 9.9),  # beyond its top left
    (20.2, 11.1, 40.0, 33.3),  # beyond its bottom right
    (-50.0, -50.0, 80.0, 70.0),  # around it
    (-0.4, -0.4, 5.3, 0.4),  # a corner between -1 and 0 once widened
    (7.6, 8.6, 8.4, 9.4),  # smaller than a pixel, across two
    (7.4, 8.4, 7.6, 8.6),  # inside one
    (9.0, 9.0, 9.0, 9.0),  # a point
    (12.0, 3.0, 12.2, 21.0),  # thin
    (30.8, 23.7, 31.0, 24.0),  # in the last corner
]


def cases(boxes: list[tuple[float, ...]], cells: int) -> tuple[np.ndarray, np.ndarray]:
    """(masks [N, cells, cells], boxes [N, 4]), float32."""
    return np.random.default_rng(0).uniform(size=(len(boxes), cells, cells)).astype(
        np.float32
    ), np.array(boxes, np.float32)


def pasted_by_torchvision(
    masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Probabilities float32 [N, height, width]."""
    import torch
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    return paste_masks_in_image(torch.from_numpy(masks)[:, None], torch.from_numpy(boxes), size)[
        :, 0
    ].numpy()


if __name__ == "__main__":
    masks, boxes = cases(BOXES, 14)
    np.savez_compressed(
        RECORDED, masks=masks, boxes=boxes, pasted=pasted_by_torchvision(masks, boxes, SIZE)
    )
    print(f"{RECORDED}: {RECORDED.stat().st_size} bytes")
