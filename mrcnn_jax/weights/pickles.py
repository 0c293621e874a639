"""Tensors from pickles and torch's archives (.pkl, .pth), without torch and without running what a
pickle asks for.

A pickle is a program. `pickle.Unpickler`, however few names it is left with, dies of a few hostile
bytes (a deeply nested key overflows the C stack, a large memo index takes all memory) and sets
attributes of what it was allowed to make. So the program is read here, opcode by opcode: it makes
numbers, strings, containers and what `_NAMES` lists, and can call nothing else.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of torch's older stream
_MAX_RANK = 8


def read_pickled(data: bytes) -> dict[str, np.ndarray]:
    """The named tensors of a .pkl or .pth file, as read-only arrays.

    They may lie under "model" or "state_dict" (detectron2's zoo, training checkpoints).

    Args:
        data: the file: torch's zip archive, its older stream of pickles and storages, or one
            pickle.

    Raises:
        Exception: of any kind, if the file is damaged or asks for something else than numbers,
            strings, containers and arrays.
    """
    content, storages = _read_zip(data) if data.startswith(b"PK") else _read_stream(data)
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict):
        raise ValueError("holds no table of tensors")
    return {name: _resolve(name, value, storages) for name, value in content.items()}


def _resolve(name: Any, value: Any, storages: Mapping[str, np.ndarray]) -> np.ndarray:
    if isinstance(value, _Tensor):
        if value.storage.key not in storages:
            raise ValueError(f"{name!r:.80}: its storage is missing")
        return _view(value, storages[value.storage.key])
    if isinstance(value, _Array):
        value = value.value
    if not isinstance(name, str) or not isinstance(value, np.ndarray):
        raise ValueError(f"{name!r:.80}: not a tensor")
    return value


# -- files -----------------------------------------------------------------------------------------


def _read_zip(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """torch.save since 1.6: <name>/data.pkl, <name>/data/<key> for each storage and, in newer ones,
    <name>/byteorder."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:

        def read(name: str, size: int | None = None) -> bytes:
            info = archive.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED or size not in (
                None,
                info.file_size,
            ):  # as torch stores them
                raise ValueError(f"{name!r:.80}: {info.file_size} bytes, not {size}, or compressed")
            return archive.read(info)

        names = archive.namelist()
        (folder,) = [
            match[1] for name in names if (match := re.fullmatch(r"([^/]+/)data\.pkl", name))
        ]
        content, declared = _run(io.BytesIO(read(f"{folder}data.pkl")), limit=len(data))
        big = f"{folder}byteorder" in names and read(f"{folder}byteorder") == b"big"
        storages = {}
        for key, (_, dtype, length) in declared.items():
            storages[key] = _numbers(
                read(f"{folder}data/{key}", length * dtype.itemsize), dtype, ">" if big else "<"
            )
        return content, storages


def _read_stream(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """One pickle; or torch.save before 1.6: magic, protocol, system, content, keys (a pickle each),
    and each key's length and storage."""
    stream = io.BytesIO(data)
    content, declared = _run(stream, limit=len(data))
    if content != _MAGIC:
        return content, {}
    if _run(stream, limit=len(data))[0] != _PROTOCOL:
        raise ValueError("another protocol of torch.save")
    _run(
        stream, limit=len(data)
    )  # the writer's byte order: storages are little-endian whatever it is
    content, declared = _run(stream, limit=len(data))
    storages = {}
    for key in _run(stream, limit=len(data))[0]:
        if _checked_key(key) not in declared:
            raise ValueError(f"storage {key!r:.80}: of no tensor")
        _, dtype, length = declared[key]
        if stream.read(8) != struct.pack("<q", length):
            raise ValueError(f"storage {key!r:.80}: not of {length} elements")
        storages[key] = _numbers(stream.read(length * dtype.itemsize), dtype, "<")
        if len(storages[key]) != length:
            raise ValueError(f"storage {key!r:.80}: cut short")
    return content, storages


def _numbers(data: bytes, dtype: np.dtype, order: str) -> np.ndarray:
    """By way of integers: bfloat16 knows no byte order."""
    return (
        np.frombuffer(data, f"{order}u{dtype.itemsize}")
        .astype(f"u{dtype.itemsize}", copy=False)
        .view(dtype)
    )


# -- what a pickle may make ------------------------------------------------------------------------


class _Storage(NamedTuple):
    """A run of numbers beside the pickle, of which tensors are views."""

    key: str
    dtype: np.dtype
    length: int


class _Tensor(NamedTuple):
    """torch.Tensor: a view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: Any
    shape: Any
    strides: Any


class _Array:
    """numpy.ndarray: made empty, then given its state."""

    value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if fortran else "C")


class _DType:
    """numpy.dtype: its state adds the byte order."""

    def __init__(self, code: str) -> None:
        if not re.fullmatch(r"[fiub][1248]", code):
            raise ValueError(f"arrays of dtype {code!r:.20} are refused")
        self.value = np.dtype(code)

    def build(self, state: Any) -> None:
        self.value = self.value.newbyteorder(state[1])


def _from_buffer(data: bytes, dtype: _DType, shape: Any, order: Any) -> np.ndarray:
    if _size(shape) * dtype.value.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} and {dtype.value} in {len(data)} bytes")
    return np.frombuffer(data, dtype.value).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    """The content of an array, where the pickle's protocol has no bytes."""
    if encoding != "latin1":
        raise ValueError("bytes that are not latin1")
    return text.encode(encoding)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    return _Tensor(storage, offset, shape, strides)


def _view(tensor: _Tensor, data: np.ndarray) -> np.ndarray:
    """The tensor's numbers in its storage's `data`; ValueError if they do not lie in there."""
    size, strides = _size(tensor.shape), tensor.strides
    if len(strides) != len(tensor.shape) or any(
        type(number) is not int or number < 0 for number in (tensor.offset, *strides)
    ):
        raise ValueError("a tensor without proper offset and strides")
    last = tensor.offset + sum(
        (side - 1) * stride for side, stride in zip(tensor.shape, strides, strict=True)
    )
    # No more elements than there are, either: with strides of 0 a few bytes make a tensor of any
    # size.
    if size > len(data) or (size and last >= len(data)):
        raise ValueError(
            f"a tensor of shape {tensor.shape} does not lie in its storage of {len(data)}"
        )
    steps = [stride * data.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(
        data[tensor.offset :], tensor.shape, steps, writeable=False
    )


def _size(shape: Any) -> int:
    """Elements of an array of `shape`; ValueError if it is none."""
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MAX_RANK
        or any(type(side) is not int or side < 0 for side in shape)
    ):
        raise ValueError("an array without a proper shape")
    return math.prod(shape)


def _checked_key(key: Any) -> str | int:
    """The hash of anything else could be made to overflow the C stack."""
    if not isinstance(key, str | int):
        raise ValueError("a table whose keys are no strings")
    return key


# What a pickle may name, and what stands in for it: functions that check their arguments and keep
# them, and values that can't be called.
_NAMES: dict[str, Any] = {
    "collections.OrderedDict": lambda: {},
    "_codecs.encode": _encode,
    "__builtin__.bytes": lambda: b"",
    "numpy.dtype": lambda code, align, copy: _DType(code),
    "numpy.ndarray": None,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
}
_STORAGES = {
    "Double": "f8",
    "Float": "f4",
    "Half": "f2",
    "Long": "i8",
    "Int": "i4",
    "Short": "i2",
    "Char": "i1",
    "Byte": "u1",
    "Bool": "?",
}
_NAMES |= {f"torch.{name}Storage": np.dtype(code) for name, code in _STORAGES.items()}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _NAMES |= {
        f"{_core}.multiarray._reconstruct": lambda subtype, shape, code: _Array(),
        f"{_core}.numeric._frombuffer": _from_buffer,
    }


# -- the pickle's program --------------------------------------------------------------------------

_LITERALS = re.compile(
    r"BININT[12]?|LONG[14]|BINFLOAT|(SHORT_)?BIN(UNICODE|BYTES)|BINUNICODE8|BINBYTES8|BYTEARRAY8"
)
_FRESH: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}


def _run(stream: BinaryIO, limit: int) -> tuple[Any, dict[Any, _Storage]]:
    """What the pickle at the stream's position makes, and the storages that it declares.

    `limit` bounds the bytes of arrays and storages that it may make: those of the file.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: dict[Any, _Storage] = {}
    made = 0

    def pop(count: int) -> list[Any]:
        return [stack.pop() for _ in range(count)][::-1]

    def pop_to_mark() -> list[Any]:
        return pop(len(stack) - marks.pop())

    for opcode, value, _ in pickletools.genops(stream):
        name, argument = opcode.name, cast(Any, value)
        if name in ("PROTO", "FRAME"):
            pass
        elif name == "STOP":
            break
        elif _LITERALS.fullmatch(name):
            stack.append(argument)
        elif name in _FRESH:
            stack.append(_FRESH[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(pop(int(name[-1]))))
        elif name == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = pop(1) if name == "APPEND" else pop_to_mark()
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = pop(2) if name == "SETITEM" else pop_to_mark()
            _expect(stack[-1], dict).update(
                (_checked_key(key), value)
                for key, value in zip(items[::2], items[1::2], strict=True)
            )
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            named = argument.replace(" ", ".") if name == "GLOBAL" else ".".join(pop(2))
            if named not in _NAMES:
                raise ValueError(
                    f"asks for {named:.80}; only tensors, arrays and containers are read (save model.state_dict() alone)"
                )
            stack.append(_NAMES[named])
        elif name == "REDUCE":
            function, arguments = pop(2)
            if not callable(function):
                raise ValueError("calls what is no function")
            stack.append(function(*arguments))
            made += len(stack[-1]) if isinstance(stack[-1], bytes) else 0
        elif name == "BUILD":
            (state,) = pop(1)
            if not isinstance(
                stack[-1], dict
            ):  # what torch keeps as attributes of its OrderedDict are versions of modules
                _expect(stack[-1], _Array | _DType).build(state)
        elif name == "BINPERSID":
            ((kind, dtype, key, _, length, *view),) = pop(
                1
            )  # a view is of another storage (torch before 0.4)
            if (
                kind != "storage"
                or not isinstance(dtype, np.dtype)
                or type(length) is not int
                or length < 0
                or view not in ([], [None])
            ):
                raise ValueError("a storage without a proper type and length")
            if _checked_key(key) not in storages:
                made += length * dtype.itemsize
            stack.append(_Storage(key, dtype, length))
            if storages.setdefault(key, stack[-1]) != stack[-1]:
                raise ValueError(f"two storages {key!r:.80}")
        else:
            raise ValueError(f"opcode {name} is of no tensor, array or container")
        if made > limit:
            raise ValueError(f"arrays of more than the file's {limit} bytes")
    return pop(1)[0], storages


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError("puts something into what is no container and no array")
    return value
