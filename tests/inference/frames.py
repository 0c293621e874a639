"""Reading images and writing videos, as the tests of inference need them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

WIDTH = 128


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


def write_video(path: Path, frames: Sequence[np.ndarray], codec: str = "MJPG") -> None:
    size = frames[0].shape[1::-1]
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 25, size)
    for frame in frames:
        video.write(np.ascontiguousarray(frame[..., ::-1]))
    video.release()
