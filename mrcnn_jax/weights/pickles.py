"""Tensors from pickles and torch's archives (.pkl, .pth), without torch and without `pickle`
(`weights.pickle_machine` says why)."""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mrcnn_jax.output import listed
from mrcnn_jax.weights.pickle_machine import (
    Array,
    Tensor,
    checked_key,
    element_count,
    refuse_foreign,
    run_pickle,
)

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of torch's older stream
_WRAPPERS = ("model", "state_dict", "model_state_dict", "teacher")


class Pickled(NamedTuple):
    """Content of a file."""

    tensors: dict[str, np.ndarray]
    """Read-only."""
    meta: Mapping[Any, Any]
    """What the file has under "meta", beside its table of tensors (mmdetection): numbers, strings
    and containers, and other values that are not to be used."""
    note: str = ""
    """Which of several tables of tensors (raw weights, averaged ones) was read; "" of one."""


def read_pickled(data: bytes) -> Pickled:
    """Reads the named tensors of a .pkl or .pth file.

    They may lie under "model", "state_dict" or "model_state_dict" (detectron2's zoo, training
    checkpoints) or "teacher" (DINO). Whatever else such a file holds is not used.

    Args:
        data: content of the file: torch's zip archive, its older stream of pickles and storages, or
            a single pickle.

    Raises:
        Exception: of any kind, if the file is damaged, or the table of tensors holds anything else.
    """
    content, storages = _read_zip(data) if data.startswith(b"PK") else _read_stream(data)
    meta: Any = {}
    note = ""
    tables = _tables(content)
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            if others := [name for name in tables if name != wrapper]:
                note = f"read: {wrapper}; also there: {_named(others)}, not read"
            meta, content = content.get("meta"), content[wrapper]
            break
    else:
        if tables and not any(map(_is_tensor, content.values())):
            raise ValueError(
                f"tensors are looked for under {', '.join(_WRAPPERS)}; here they are under "
                f"{_named(tables)}: save that alone"
            )
    refuse_foreign(content)
    if not isinstance(content, dict):
        raise ValueError("holds no table of tensors")
    if not content:
        raise ValueError("holds no tensors")
    tensors = {name: _resolve(name, value, storages) for name, value in content.items()}
    return Pickled(tensors, meta if isinstance(meta, dict) else {}, note)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | Array | np.ndarray)


def _tables(content: Any) -> list[Any]:
    """The keys under which a file has tables of tensors."""
    if not isinstance(content, dict):
        return []
    return [
        name
        for name, value in content.items()
        if isinstance(value, dict) and any(map(_is_tensor, value.values()))
    ]


def _named(keys: list[Any]) -> str:
    return listed([f"{key!r:.40}" for key in keys])


def _resolve(name: Any, value: Any, storages: Mapping[str, np.ndarray]) -> np.ndarray:
    if isinstance(value, Array):
        value = value.value
    refuse_foreign(value)
    if not isinstance(name, str):
        raise ValueError(f"{name!r:.80}: not a tensor's name")
    if isinstance(value, Tensor):
        if value.storage.key not in storages:
            raise ValueError(f"{name!r:.80}: its storage is missing")
        return _view(value, storages[value.storage.key])
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name!r:.80}: not a tensor")
    return value


# -- files -----------------------------------------------------------------------------------------


def _read_zip(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """Reads the format of torch.save since 1.6, a zip archive.

    It has <name>/data.pkl, <name>/data/<key> for each storage and, lately, <name>/byteorder.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:

        def read(name: str, size: int | None = None) -> bytes:
            info = archive.getinfo(name)
            # torch stores them uncompressed.
            if info.compress_type != zipfile.ZIP_STORED or size not in (None, info.file_size):
                raise ValueError(f"{name!r:.80}: {info.file_size} bytes, not {size}, or compressed")
            return archive.read(info)

        names = archive.namelist()
        (folder,) = [
            match[1] for name in names if (match := re.fullmatch(r"([^/]+/)data\.pkl", name))
        ]
        content, declared = run_pickle(io.BytesIO(read(f"{folder}data.pkl")), limit=len(data))
        big = f"{folder}byteorder" in names and read(f"{folder}byteorder") == b"big"
        storages = {}
        for key, (_, dtype, length) in declared.items():
            storages[key] = _numbers(
                read(f"{folder}data/{key}", length * dtype.itemsize), dtype, ">" if big else "<"
            )
        return content, storages


def _read_stream(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """Reads one pickle, or the format of torch.save before 1.6.

    That is five pickles: magic, protocol, system, content, keys; then each key's length and
    storage.
    """
    stream = io.BytesIO(data)
    content, declared = run_pickle(stream, limit=len(data))
    if content != _MAGIC:
        return content, {}
    if run_pickle(stream, limit=len(data))[0] != _PROTOCOL:
        raise ValueError("another protocol of torch.save")
    # The writer's byte order; storages are always little-endian.
    run_pickle(stream, limit=len(data))
    content, declared = run_pickle(stream, limit=len(data))
    storages = {}
    for key in run_pickle(stream, limit=len(data))[0]:
        if checked_key(key) not in declared:
            raise ValueError(f"storage {key!r:.80}: of no tensor")
        _, dtype, length = declared[key]
        if stream.read(8) != struct.pack("<q", length):
            raise ValueError(f"storage {key!r:.80}: not of {length} elements")
        storages[key] = _numbers(stream.read(length * dtype.itemsize), dtype, "<")
        if len(storages[key]) != length:
            raise ValueError(f"storage {key!r:.80}: cut short")
    return content, storages


def _numbers(data: bytes, dtype: np.dtype, order: str) -> np.ndarray:
    """Reads numbers of a byte order by way of integers: bfloat16 knows none."""
    integers = np.frombuffer(data, f"{order}u{dtype.itemsize}")
    return integers.astype(f"u{dtype.itemsize}", copy=False).view(dtype)


def _view(tensor: Tensor, data: np.ndarray) -> np.ndarray:
    """Returns a view of the tensor's numbers; ValueError if they do not all lie in `data`."""
    size, strides = element_count(tensor.shape), tensor.strides
    if len(strides) != len(tensor.shape) or any(
        type(number) is not int or number < 0 for number in (tensor.offset, *strides)
    ):
        raise ValueError("a tensor without proper offset and strides")
    last = tensor.offset + sum(
        (side - 1) * stride for side, stride in zip(tensor.shape, strides, strict=True)
    )
    # Nor may it have more elements than `data`: strides of 0 make a tensor of any size of few
    # bytes.
    if size > len(data) or (size and last >= len(data)):
        raise ValueError(
            f"a tensor of shape {tensor.shape} does not lie in its storage of {len(data)}"
        )
    steps = [stride * data.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(
        data[tensor.offset :], tensor.shape, steps, writeable=False
    )
