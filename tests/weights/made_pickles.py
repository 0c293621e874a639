"""Pickles by hand, of torch's files and of who means harm."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from typing import Any

import numpy as np


def op(value: Any) -> bytes:
    """The opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def storage(key: Any = "0", kind: str = "FloatStorage", length: Any = 6, view: tuple = ()) -> bytes:
    items = op("storage"), named("torch", kind), *map(op, (key, "cpu", length, *view))
    return b"(" + b"".join(items) + b"tQ"


def tensor(
    storage: bytes = storage(),
    offset: Any = 0,
    shape: Any = (2, 3),
    strides: Any = (3, 1),
    function: str = "_rebuild_tensor_v2",
) -> bytes:
    rest = map(op, (offset, shape, strides, False, None))
    return call(named("torch._utils", function), storage, *rest)


def table(**values: bytes) -> bytes:
    """A pickle of a dict."""
    return b"\x80\x02}(" + b"".join(op(name) + value for name, value in values.items()) + b"u."


def archive(
    content: bytes,
    storages: dict[str, bytes],
    order: bytes | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        made.writestr("model/data.pkl", content)
        for key, data in storages.items():
            made.writestr(f"model/data/{key}", data)
        if order is not None:
            made.writestr("model/byteorder", order)
    return file.getvalue()


def stream(content: bytes, storages: dict[str, bytes], itemsize: int = 4) -> bytes:
    head = b"".join(
        pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    data = b"".join(struct.pack("<q", len(raw) // itemsize) + raw for raw in storages.values())
    return head + content + pickle.dumps(list(storages), 2) + data


SIX = np.arange(6, dtype="<f4")


class Command:
    """Pickled as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)
