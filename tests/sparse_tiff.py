"""Writes a large TIFF that takes little room on the disk."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def sparse_tiff(path: Path, side: int, discs: dict[tuple[int, int], int]) -> None:
    """A TIFF of side x side RGB pixels in one strip, without its blank pixels on the disk, with
    discs of 40 pixels' radius: centre -> red."""
    entries = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 3, 8),
        (259, 4, 1, 1),
        (262, 4, 1, 2),
        (273, 4, 1, 512),
        (277, 4, 1, 3),
        (278, 4, 1, side),
        (279, 4, 1, 3 * side * side),
    ]
    with path.open("wb") as file:
        file.write(b"II*\0" + struct.pack("<L3H", 14, 8, 8, 8) + struct.pack("<H", len(entries)))
        file.write(b"".join(struct.pack("<HHLL", *entry) for entry in entries) + bytes(4))
        for (y, x), red in discs.items():
            for dy in range(-40, 41):
                half = int(np.sqrt(40**2 - dy**2))
                file.seek(512 + 3 * ((y + dy) * side + x - half))
                file.write(bytes([red, 0, 0]) * (2 * half + 1))
        file.truncate(512 + 3 * side * side)
