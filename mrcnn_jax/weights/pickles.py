"""Tensors from pickles and torch's archives (.pkl, .pth), without torch and without `pickle`.

A pickle is a program. `pickle.Unpickler`, however few names it may look up, dies of a few hostile
bytes (a deeply nested key overflows the C stack, a large memo index takes all memory) and sets
attributes of whatever it may make. So the program is interpreted here, opcode by opcode: it makes
numbers, strings, containers and what `_NAMES` lists, and can call nothing else. Training
checkpoints hold objects of other classes beside their tensors (mmengine's logs, argparse's
arguments): nothing is looked up for them, and a name stands where each would be.
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
_WRAPPERS = ("model", "state_dict", "teacher")


class Pickled(NamedTuple):
    """Content of a file."""

    tensors: dict[str, np.ndarray]
    """Read-only."""
    meta: Mapping[Any, Any]
    """What the file has under "meta", beside its table of tensors (mmdetection): numbers, strings
    and containers, and other values that are not to be used."""


def read_pickled(data: bytes) -> Pickled:
    """Reads the named tensors of a .pkl or .pth file.

    They may lie under "model" or "state_dict" (detectron2's zoo, training checkpoints) or "teacher"
    (DINO). Whatever else such a file holds is not used.

    Args:
        data: content of the file: torch's zip archive, its older stream of pickles and storages, or
            a single pickle.

    Raises:
        Exception: of any kind, if the file is damaged, or the table of tensors holds anything else.
    """
    content, storages = _read_zip(data) if data.startswith(b"PK") else _read_stream(data)
    meta: Any = {}
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            meta, content = content.get("meta"), content[wrapper]
            break
    _refuse_foreign(content)
    if not isinstance(content, dict):
        raise ValueError("holds no table of tensors")
    if not content:
        raise ValueError("holds no tensors")
    tensors = {name: _resolve(name, value, storages) for name, value in content.items()}
    return Pickled(tensors, meta if isinstance(meta, dict) else {})


def _resolve(name: Any, value: Any, storages: Mapping[str, np.ndarray]) -> np.ndarray:
    if isinstance(value, _Array):
        value = value.value
    _refuse_foreign(value)
    if isinstance(value, _Tensor):
        if value.storage.key not in storages:
            raise ValueError(f"{name!r:.80}: its storage is missing")
        return _view(value, storages[value.storage.key])
    if not isinstance(name, str) or not isinstance(value, np.ndarray):
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
        content, declared = _run(io.BytesIO(read(f"{folder}data.pkl")), limit=len(data))
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
    content, declared = _run(stream, limit=len(data))
    if content != _MAGIC:
        return content, {}
    if _run(stream, limit=len(data))[0] != _PROTOCOL:
        raise ValueError("another protocol of torch.save")
    _run(stream, limit=len(data))  # the writer's byte order; storages are always little-endian
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
    """Reads numbers of a byte order by way of integers: bfloat16 knows none."""
    integers = np.frombuffer(data, f"{order}u{dtype.itemsize}")
    return integers.astype(f"u{dtype.itemsize}", copy=False).view(dtype)


# -- what a pickle may make ------------------------------------------------------------------------


class _Foreign(NamedTuple):
    """An object of another class, or the class or function itself: none of it is kept."""

    name: str


def _refuse_foreign(value: Any) -> None:
    if isinstance(value, _Foreign):
        raise ValueError(
            f"asks for {value.name:.80}; only tensors, arrays and containers are read"
            " (save model.state_dict() alone)"
        )


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

    value: np.ndarray | _Foreign | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if fortran else "C")


class _DType:
    """numpy.dtype: its state adds the byte order."""

    def __init__(self, code: str) -> None:
        self.value = np.dtype(code)

    @classmethod
    def of(cls, code: str) -> _DType | _Foreign:
        known = re.fullmatch(r"[fiub][1248]", code)
        return cls(code) if known else _Foreign(f"an array of dtype {code!r:.20}")

    def build(self, state: Any) -> None:
        self.value = self.value.newbyteorder(state[1])


def _from_buffer(
    data: bytes, dtype: _DType | _Foreign, shape: Any, order: Any
) -> np.ndarray | _Foreign:
    if isinstance(dtype, _Foreign):
        return dtype
    if _size(shape) * dtype.value.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} and {dtype.value} in {len(data)} bytes")
    return np.frombuffer(data, dtype.value).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    """Makes the bytes of an array, where the pickle's protocol has none."""
    if encoding != "latin1":
        raise ValueError("bytes that are not latin1")
    return text.encode(encoding)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    return _Tensor(storage, offset, shape, strides)


def _view(tensor: _Tensor, data: np.ndarray) -> np.ndarray:
    """Returns a view of the tensor's numbers; ValueError if they do not all lie in `data`."""
    size, strides = _size(tensor.shape), tensor.strides
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


def _size(shape: Any) -> int:
    """Returns the number of elements of an array of `shape`; ValueError if it is no shape."""
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MAX_RANK
        or any(type(side) is not int or side < 0 for side in shape)
    ):
        raise ValueError("an array without a proper shape")
    return math.prod(shape)


def _checked_key(key: Any) -> str | int:
    """Refuses other keys of storages, whose hash could be made to overflow the C stack."""
    if not isinstance(key, str | int):
        raise ValueError("a storage whose key is no string")
    return key


# What a pickle may name, and what stands in for it: functions that check and keep their arguments,
# and values that cannot be called.
_NAMES: dict[str, Any] = {
    "collections.OrderedDict": lambda: {},
    "_codecs.encode": _encode,
    "__builtin__.bytes": lambda: b"",
    "numpy.dtype": lambda code, align, copy: _DType.of(code),
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
    "EMPTY_SET": lambda: _Foreign("a set"),
}


def _run(stream: BinaryIO, limit: int) -> tuple[Any, dict[Any, _Storage]]:
    """Runs the pickle at the stream's position.

    Args:
        stream: a binary stream.
        limit: most bytes of arrays and storages that the pickle may make: those of the file.

    Returns:
        What the pickle makes, and the storages that it declares, by key.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "STOP":
            break
        machine.step(opcode.name, cast(Any, argument))
        if machine.made > limit:
            raise ValueError(f"arrays of more than the file's {limit} bytes")
    return machine.pop(1)[0], machine.storages


class _Machine:
    """The stack machine of a pickle, with the opcodes that tensors need and no others."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[Any, _Storage] = {}
        self.made = 0  # bytes of arrays and storages

    def step(self, name: str, argument: Any) -> None:
        """Does what one opcode asks for."""
        if _LITERALS.fullmatch(name):
            self.stack.append(argument)
        elif name in _FRESH:
            self.stack.append(_FRESH[name]())
        elif name in _STEPS:
            _STEPS[name](self, argument)
        else:
            raise ValueError(f"opcode {name} is of no tensor, array or container")

    def pop(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def pop_to_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - self.marks.pop())

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], _Foreign):
            _expect(self.stack[-1], list).extend(items)

    def update(self, items: list[Any]) -> None:
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(self.stack[-1], _Foreign):
            return
        # Hashing other keys could be made to overflow the C stack; no tensor has one.
        kept = ((key, value) for key, value in pairs if isinstance(key, str | int))
        _expect(self.stack[-1], dict).update(kept)

    def freeze(self, _: list[Any]) -> None:
        self.stack.append(_Foreign("a set"))

    def remember(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def find(self, name: str) -> None:
        self.stack.append(_NAMES[name] if name in _NAMES else _Foreign(name))

    def make(self) -> None:
        """NEWOBJ: an object of a class, of which only the name stays."""
        kind, _ = self.pop(2)
        if not isinstance(kind, _Foreign):
            raise ValueError("opcode NEWOBJ is of no tensor, array or container")
        self.stack.append(kind)

    def call(self) -> None:
        function, arguments = self.pop(2)
        if isinstance(function, _Foreign):
            self.stack.append(function)
            return
        if not callable(function):
            raise ValueError("calls what is no function")
        result = function(*arguments)
        self.made += len(result) if isinstance(result, bytes) else 0
        self.stack.append(result)

    def build(self) -> None:
        (state,) = self.pop(1)
        # The state of a dict is the attributes of torch's OrderedDict: versions of modules.
        if not isinstance(self.stack[-1], dict | _Foreign):
            _expect(self.stack[-1], _Array | _DType).build(state)

    def declare(self) -> None:
        # `view`: the storage is part of another one (torch before 0.4).
        ((kind, dtype, key, _, length, *view),) = self.pop(1)
        if (
            kind != "storage"
            or not isinstance(dtype, np.dtype)
            or type(length) is not int
            or length < 0
            or view not in ([], [None])
        ):
            raise ValueError("a storage without a proper type and length")
        storage = _Storage(key, dtype, length)
        if _checked_key(key) not in self.storages:
            self.made += length * dtype.itemsize
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"two storages {key!r:.80}")
        self.stack.append(storage)


_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE1": lambda machine, _: machine.stack.append(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.stack.append(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.stack.append(tuple(machine.pop(3))),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "FROZENSET": lambda machine, _: machine.freeze(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.update(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_to_mark()),
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    "BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "LONG_BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "GLOBAL": lambda machine, name: machine.find(name.replace(" ", ".")),
    "STACK_GLOBAL": lambda machine, _: machine.find(".".join(machine.pop(2))),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.make(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.declare(),
}


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError("puts something into what is no container and no array")
    return value
