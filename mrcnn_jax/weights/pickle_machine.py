"""Runs the program that a pickle is, which may make tensors, arrays and containers here.

`pickle.Unpickler`, however few names it may look up, dies of a few hostile bytes (a deeply nested
key overflows the C stack, a large memo index takes all memory) and sets attributes of whatever it
may make. So the program is interpreted, opcode by opcode: it makes numbers, strings, containers
and what `_NAMES` lists, and can call nothing else. Training checkpoints hold objects of other
classes beside their tensors (mmengine's logs, argparse's arguments): nothing is looked up for
them, and a name stands where each would be.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

_MAX_RANK = 8


class Foreign(NamedTuple):
    """An object of another class, or the class or function itself: none of it is kept."""

    name: str


def refuse_foreign(value: Any) -> None:
    """Raises ValueError if `value` stands for an object that was not made."""
    if isinstance(value, Foreign):
        raise ValueError(
            f"asks for {value.name:.80}; only tensors, arrays and containers are read"
            " (save model.state_dict() alone)"
        )


class Storage(NamedTuple):
    """A run of numbers beside the pickle, of which tensors are views."""

    key: str
    dtype: np.dtype
    length: int


class Tensor(NamedTuple):
    """torch.Tensor: a view of a storage; offset and strides count elements."""

    storage: Storage
    offset: Any
    shape: Any
    strides: Any


class Array:
    """numpy.ndarray: made empty, then given its state."""

    value: np.ndarray | Foreign | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if fortran else "C")


class _DType:
    """numpy.dtype: its state adds the byte order."""

    def __init__(self, code: str) -> None:
        self.value = np.dtype(code)

    @classmethod
    def of(cls, code: str) -> _DType | Foreign:
        known = re.fullmatch(r"[fiub][1248]", code)
        return cls(code) if known else Foreign(f"an array of dtype {code!r:.20}")

    def build(self, state: Any) -> None:
        self.value = self.value.newbyteorder(state[1])


def _from_buffer(
    data: bytes, dtype: _DType | Foreign, shape: Any, order: Any
) -> np.ndarray | Foreign:
    if isinstance(dtype, Foreign):
        return dtype
    if element_count(shape) * dtype.value.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} and {dtype.value} in {len(data)} bytes")
    return np.frombuffer(data, dtype.value).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    """Makes the bytes of an array, where the pickle's protocol has none."""
    if encoding != "latin1":
        raise ValueError("bytes that are not latin1")
    return text.encode(encoding)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    return Tensor(storage, offset, shape, strides)


def element_count(shape: Any) -> int:
    """Returns the number of elements of an array of `shape`; ValueError if it is no shape."""
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MAX_RANK
        or any(type(side) is not int or side < 0 for side in shape)
    ):
        raise ValueError("an array without a proper shape")
    return math.prod(shape)


def checked_key(key: Any) -> str | int:
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
        f"{_core}.multiarray._reconstruct": lambda subtype, shape, code: Array(),
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
    "EMPTY_SET": lambda: Foreign("a set"),
}


def run_pickle(stream: BinaryIO, limit: int) -> tuple[Any, dict[Any, Storage]]:
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
        self.storages: dict[Any, Storage] = {}
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
        if not isinstance(self.stack[-1], Foreign):
            _expect(self.stack[-1], list).extend(items)

    def update(self, items: list[Any]) -> None:
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(self.stack[-1], Foreign):
            return
        # Hashing other keys could be made to overflow the C stack; no tensor has one.
        kept = ((key, value) for key, value in pairs if isinstance(key, str | int))
        _expect(self.stack[-1], dict).update(kept)

    def freeze(self, _: list[Any]) -> None:
        self.stack.append(Foreign("a set"))

    def remember(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def find(self, name: str) -> None:
        self.stack.append(_NAMES[name] if name in _NAMES else Foreign(name))

    def make(self) -> None:
        """NEWOBJ: an object of a class, of which only the name stays."""
        kind, _ = self.pop(2)
        if not isinstance(kind, Foreign):
            raise ValueError("opcode NEWOBJ is of no tensor, array or container")
        self.stack.append(kind)

    def call(self) -> None:
        function, arguments = self.pop(2)
        if isinstance(function, Foreign):
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
        if not isinstance(self.stack[-1], dict | Foreign):
            _expect(self.stack[-1], Array | _DType).build(state)

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
        storage = Storage(key, dtype, length)
        if checked_key(key) not in self.storages:
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
