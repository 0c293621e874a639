"""Pickles do nothing but make tensors, arrays and containers, whoever wrote them."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrcnn_jax.weights.pickles import read_pickled
from tests.weights.made_pickles import (
    SIX,
    Command,
    archive,
    call,
    named,
    op,
    storage,
    stream,
    table,
    tensor,
)


def read(data: bytes) -> dict[str, np.ndarray]:
    return read_pickled(data).tensors


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_commands_are_not_run(protocol: int, tmp_path: Path) -> None:
    evil = pickle.dumps({"w": Command(f"touch {tmp_path / 'ran'}")}, protocol=protocol)
    for data in (evil, archive(evil, {}), stream(evil, {})):
        with pytest.raises(ValueError, match=rf"asks for {os.system.__module__}\.system"):
            read(data)
    assert not list(tmp_path.iterdir())
    pickle.loads(evil)  # and it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.getattr",
        "__builtin__.bytearray",
        "torch.load",
        "torch.storage._load_from_bytes",
        "numpy.load",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    module, attribute = name.rsplit(".", 1)
    with pytest.raises(ValueError, match=f"asks for {name}; only tensors, arrays and containers"):
        read(b"\x80\x02}" + op("w") + named(module, attribute) + b"s.")
    with pytest.raises(ValueError, match=f"asks for {name};"):
        read(b"\x80\x04}" + op("w") + op(module) + op(attribute) + b"\x93s.")


def array(shape: Any = (2, 3), code: str = "f4", order: str = "<", text: bool = True) -> bytes:
    """SIX in NumPy's way: an empty array, then its state."""
    dtype = call(named("numpy", "dtype"), op(code), op(False), op(True))
    dtype += op((3, order, None, None, None, -1, -1, 0)) + b"b"
    latin = op(SIX.tobytes().decode("latin1"))
    raw = call(named("_codecs", "encode"), latin, op("latin1" if text else "rot13"))
    return EMPTY + b"(" + op(1) + op(shape) + dtype + op(False) + raw + b"tb"


EMPTY = call(
    named("numpy._core.multiarray", "_reconstruct"), named("numpy", "ndarray"), op((0,)), op("b")
)
HUGE = 10**12
LIES = {
    "does not lie in its storage of 6": [
        tensor(shape=(2, 4)),
        tensor(offset=1),
        tensor(strides=(4, 1)),
        tensor(shape=(HUGE, HUGE), strides=(0, 0)),
        tensor(offset=HUGE),
    ],
    "without proper offset and strides": [
        tensor(offset=5, strides=(-3, -1)),
        tensor(offset=-1),
        tensor(offset=0.0),
        tensor(strides=(1,)),
        tensor(strides=("3", "1")),
    ],
    "without a proper shape": [
        tensor(shape=(-2, -3)),
        tensor(shape=6, strides=1),
        tensor(shape=("2", "3")),
        tensor(shape=(True, True)),
        tensor(shape=(1,) * 40, strides=(1,) * 40),
        array((-2, -3)),
        array(6),
    ],
    "without a storage": [tensor(op("0"))],
    "without a proper type and length": [
        tensor(storage(length=-6)),
        tensor(storage(length=6.0)),
        tensor(storage(view=(("1", 0, 6),))),
        b"(" + op("storage") + op("FloatStorage") + op("0") + op("cpu") + op(6) + b"tQ",
    ],
    "24 bytes, not|not of . elements|cut short": [
        tensor(storage(length=7)),
        tensor(storage(length=5)),
        tensor(storage(kind="DoubleStorage")),
    ],
    "no item named 'model/data/1'|storage '0': of no tensor": [tensor(storage(key="1"))],
    "key is no string": [tensor(storage(key=(1, 2)))],
    "two storages '0'": [tensor(storage()) + tensor(storage(kind="IntStorage")) + b"\x86"],
    "of more than the file's": [
        tensor(storage(length=HUGE)),
        tensor() + tensor(storage("1", length=HUGE)) + b"\x86",
    ],
    "in 24 bytes": [array((2, 4)), array((2, 2)), array((HUGE, HUGE)), array((2, 3), "f8")],
    "asks for an array of dtype '.*'; only tensors|of no tensor": [
        array((6,), "O8"),
        array((6,), "S4"),
        array((6,), "f16"),
        array((6,), "V4"),
    ],
    "not recognized": [array(order="?")],
    "not latin1": [array(text=False)],
    "'w': not a tensor|of no tensor": [op(1.5), op({"a": 1}), EMPTY, op("text")],
    "calls what is no function": [
        op(1) + op(()) + b"R",
        named("torch", "FloatStorage") + op((HUGE,)) + b"R",
        named("numpy", "ndarray") + op(((HUGE,),)) + b"R",
    ],
    "no container and no array": [
        named("torch._utils", "_rebuild_tensor_v2") + op({"x": 1}) + b"b",
        tensor() + op((None, {"shape": (7,)})) + b"b",
        op(1) + op(2) + b"a",
        op([]) + op("key") + op("value") + b"s",
    ],
    "opcode (INST|EXT1|NEWOBJ|PERSID)": [
        b"(ios\nsystem\n",
        b"\x82\x01",
        named("numpy", "dtype") + b")\x81",
        b"P0\n",
    ],
}


@pytest.mark.parametrize(
    ("message", "lie"), [(message, lie) for message, lies in LIES.items() for lie in lies]
)
@pytest.mark.parametrize("make", [archive, stream])
def test_lies_are_refused(message: str, lie: bytes, make: Callable[..., bytes]) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        read(make(table(w=lie), {"0": SIX.tobytes()}))


def test_arrays_by_hand() -> None:
    """The file that the false arrays are made from is read; order and dtype mean what they say."""
    for lie, expected in (
        (array(), SIX.reshape(2, 3)),
        (array((6,), "i4"), SIX.view("<i4")),
        (array((6,), order=">"), SIX.view(">f4")),
    ):
        np.testing.assert_array_equal(read(table(w=lie))["w"], expected)


def bombs() -> dict[str, bytes]:
    """A few bytes each that would take all memory, or overflow the stack, of who follows them."""
    text = op("x" * 100_000)
    twice = b"".join(
        named("_codecs", "encode") + b"(h\x09" + op("latin1") + b"tR" for _ in range(20_000)
    )  # a string of the memo, as bytes again and again
    strings, lie = op("t") + text + b"q\x09" + op("w") + b"(" + twice, struct.pack("<Q", 2**63)
    return {
        "a deep key": b"\x80\x02})" + b"\x85" * 300_000 + op(1) + b"s.",
        "a deep value": b"\x80\x02}" + op("w") + b")" + b"\x85" * 300_000 + b"s.",
        "a large memo index": b"\x80\x02}" + op("w") + op(1) + b"r\xff\xff\xff\x7fs.",
        "a long string": b"\x80\x04}" + op("w") + b"\x8d" + struct.pack("<Q", 2**50) + b"xs.",
        "bytes that are not there": b"\x80\x04}" + op("w") + b"\x8e" + lie + b"xs.",
        "a long frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}" + op("w") + op(1) + b"s.",
        "a long number": b"\x80\x02}" + op("w") + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"s.",
        "bytes made of one string": b"\x80\x02}(" + strings + b"tu.",
        "a compressed archive": archive(
            table(w=tensor()), {"0": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED
        ),
        "nothing": b"",
        "no end": b"\x80\x02}",
        "no table": pickle.dumps([1, 2]),
    }


@pytest.fixture
def little_memory() -> Iterator[None]:
    """No more than 300 MB beyond what the process has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + 300_000_000, before[1])
    )
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("bomb", bombs())
@pytest.mark.usefixtures("little_memory")
def test_bombs_are_refused_at_once(bomb: str) -> None:
    data = bombs()[bomb]
    started = time.perf_counter()
    with pytest.raises((ValueError, LookupError, OverflowError)):
        read(data)
    assert time.perf_counter() - started < 10
