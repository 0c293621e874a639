"""Reading back the pages of a figure."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np


def read_page(path: Path) -> np.ndarray:
    """RGB pixels of a PNG file."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = cv2.imread(str(path))
    assert image is not None
    return image[..., ::-1]
