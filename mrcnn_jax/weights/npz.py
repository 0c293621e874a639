"""Arrays of .npz files: nothing is unpacked before its size is known to be what it says."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

# Most bytes that a file may unpack to. Weights and images hardly shrink when they are packed, and
# few bytes can be made to unpack to any number.
_LEAST_LIMIT, _TIMES_FILE = 1 << 28, 16


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a file that numpy.savez or numpy.savez_compressed wrote.

    Raises:
        Exception: of any kind, if the file is damaged, holds anything but numbers, truth values and
            texts, or would unpack to much more than its size.
    """
    limit = max(_LEAST_LIMIT, _TIMES_FILE * path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        if len(set(names)) < len(names):
            raise ValueError("two arrays have one name")
        if (size := sum(info.file_size for info in infos)) > limit:
            raise ValueError(f"would unpack to {size} bytes, more than {limit}")
        arrays = {}
        for info in infos:
            with archive.open(info) as file:
                arrays[info.filename.removesuffix(".npy")] = _read_array(file, info)
        return arrays


def _read_array(file: IO[bytes], info: zipfile.ZipInfo) -> np.ndarray:
    name = info.filename
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name:.80}: version {version} of NumPy's format")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.kind not in "biufVU" or dtype.hasobject or dtype.names is not None:
        raise ValueError(f"{name:.80}: arrays of {dtype} are refused")
    if any(side < 0 for side in shape):
        raise ValueError(f"{name:.80}: shape {shape}")
    length = math.prod(shape) * dtype.itemsize
    if length > info.file_size:
        raise ValueError(f"{name:.80}: an array of {length} bytes in {info.file_size}")
    data = file.read(length + 1)  # one more: the end of the file checks its checksum
    if len(data) != length:
        raise ValueError(f"{name:.80}: not the {length} bytes of its shape {shape} and {dtype}")
    found: Any = np.frombuffer(data, dtype) if length else np.empty(math.prod(shape), dtype)
    return found.reshape(shape, order="F" if fortran else "C")
