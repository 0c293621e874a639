"""Pickles are read as torch and NumPy write them, and do nothing else, whoever wrote them."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.weights.pickles import read_pickled

RECORDED = Path(__file__).parent / "recorded"
FILES = ("state_dict_zip.pth", "state_dict_stream.pth")


def read(data: bytes) -> dict[str, np.ndarray]:
    return read_pickled(data).tensors


# As record.py makes them, in NumPy.
EXPECTED = {
    "matrix": (np.arange(12.0).reshape(3, 4) / 8).astype(np.float32),
    "transposed": (np.arange(6.0).reshape(2, 3) / 8).astype(np.float32).T,
    "parameter": (np.arange(6.0).reshape(2, 3) / 4).astype(np.float32),
    "part": np.arange(4, 10, dtype=np.float32).reshape(2, 3),
    "steps": np.arange(0, 24, 3, dtype=np.float32),
    "none": np.zeros((0, 3), np.float32),
    "one": np.array(7, np.int64),
    **{
        name: np.arange(5).astype(name)
        for name in ("float64", "float16", "int32", "int16", "int8", "uint8", "bool")
    },
    "bfloat16": np.arange(5).astype(jnp.bfloat16),
}


@pytest.mark.parametrize("name", FILES)
def test_both_serialisations_of_torch(name: str) -> None:
    found = read((RECORDED / name).read_bytes())
    assert found.keys() == EXPECTED.keys()
    for key, expected in EXPECTED.items():
        assert (found[key].dtype, found[key].shape) == (expected.dtype, expected.shape), key
        np.testing.assert_array_equal(found[key], expected, err_msg=key)
        assert not found[key].flags.writeable, key


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("core", [b"numpy._core", b"numpy.core"])
def test_pickled_arrays(protocol: int, core: bytes) -> None:
    """Of NumPy before and since 2, in either order of axes and of bytes, large and empty."""
    arrays = {
        "c": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "steps": np.arange(12.0).reshape(3, 4)[::2, 1:3],
        "big": np.arange(5, dtype=">f4"),
        "half": np.arange(5, dtype=np.float16),
        "none": np.zeros((0, 4), np.float32),
        "large": np.arange(70_000, dtype=np.int32),
        "flag": np.array([True, False]),
    }
    data = pickle.dumps(
        {"model": arrays, "__author__": "somebody", "matching_heuristics": True, "epoch": 2.5},
        protocol=protocol,
    )
    if protocol < 4:  # by later ones the name's length would have to be mended too
        assert b"numpy._core" in data
        data = data.replace(b"numpy._core", core)
    found = read(data)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_one_array_under_two_names() -> None:
    array = np.arange(3.0)
    found = read(pickle.dumps({"a": array, "b": array}))
    np.testing.assert_array_equal(found["a"], found["b"])


# -- torch's files, made by hand -------------------------------------------------------------------


def op(value: Any) -> bytes:
    """The opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def storage(key: Any = "0", kind: str = "FloatStorage", length: Any = 6, view: tuple = ()) -> bytes:
    return (
        b"("
        + op("storage")
        + named("torch", kind)
        + op(key)
        + op("cpu")
        + op(length)
        + b"".join(map(op, view))
        + b"tQ"
    )


def tensor(
    storage: bytes = storage(),
    offset: Any = 0,
    shape: Any = (2, 3),
    strides: Any = (3, 1),
    function: str = "_rebuild_tensor_v2",
) -> bytes:
    return (
        named("torch._utils", function)
        + b"("
        + storage
        + op(offset)
        + op(shape)
        + op(strides)
        + op(False)
        + op(None)
        + b"tR"
    )


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


@pytest.mark.parametrize("make", [archive, stream])
def test_a_number_names_no_tensor(make: Callable[..., bytes]) -> None:
    content = b"\x80\x02}(" + op(0) + tensor() + b"u."
    with pytest.raises(ValueError, match="0: not a tensor's name"):
        read(make(content, {"0": SIX.tobytes()}))


@pytest.mark.parametrize("make", [archive, stream])
def test_by_hand(make: Callable[..., bytes]) -> None:
    """The file that the hostile ones below are made from is read."""
    content = table(
        w=tensor(),
        t=tensor(shape=(3, 2), strides=(1, 3)),
        s=tensor(offset=1, shape=(2,), strides=(4,)),
    )
    found = read(make(content, {"0": SIX.tobytes()}))
    np.testing.assert_array_equal(found["w"], SIX.reshape(2, 3))
    np.testing.assert_array_equal(found["t"], SIX.reshape(2, 3).T)
    np.testing.assert_array_equal(found["s"], SIX[1::4])


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("FloatStorage", SIX),
        ("BFloat16Storage", SIX.astype(jnp.bfloat16)),
        ("LongStorage", SIX.astype("<i8")),
    ],
)
def test_big_endian_archive(kind: str, values: np.ndarray) -> None:
    size = values.itemsize
    swapped = values.view(f"u{size}").byteswap().tobytes()
    for order, raw in ((b"big", swapped), (b"little", values.tobytes())):
        found = read(archive(table(w=tensor(storage(kind=kind))), {"0": raw}, order))["w"]
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values.reshape(2, 3))


# -- hostile files ---------------------------------------------------------------------------------


class Command:
    """Pickled as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_commands_are_not_run(protocol: int, tmp_path: Path) -> None:
    evil = pickle.dumps({"w": Command(f"touch {tmp_path / 'ran'}")}, protocol=protocol)
    for data in (evil, archive(evil, {}), stream(evil, {})):
        with pytest.raises(ValueError, match=rf"asks for {os.system.__module__}\.system"):
            read(data)
    assert not list(tmp_path.iterdir())
    pickle.loads(evil)  # and it would have
    assert (tmp_path / "ran").exists()


class Log:
    """As mmengine's HistoryBuffer: attributes alone, among them arrays."""

    def __init__(self) -> None:
        self.max_length, self.history = 1_000_000, np.arange(3.0)


class Settings(dict):
    """As mmengine's ConfigDict: a container of another class."""


@pytest.mark.parametrize("protocol", [2, 3, 4])  # torch writes 2
def test_objects_beside_the_tensors_are_not_made(protocol: int, tmp_path: Path) -> None:
    """Not even a command is run; what mmdetection states as text is kept."""
    names = ("cell", "crown")
    beside = {
        "meta": {
            "cfg": "style='caffe'",
            "epoch": 12,
            "dataset_meta": {"classes": names},
            "log": Log(),
            "settings": Settings(a=1),
            "loss": np.float64(0.5),
            "hook": Command(f"touch {tmp_path / 'ran'}"),
        },
        "optimizer": {"state": {0: {"step": np.int64(3), "of": Log}}, "seen": {1, 2}},
        "classes": np.array(["cat", "dog"]),
        "objects": np.array([Log(), None], object),
        "pairs": {(0, 1): 5, 0.5: 1, None: 2},
        "frozen": frozenset({"a"}),
        "arguments": argparse.Namespace(lr=0.1, lists=[Log(), Settings(b=Log())]),
    }
    data = pickle.dumps({**beside, "state_dict": {"w": SIX}}, protocol)
    found = read_pickled(data)
    assert found.tensors.keys() == {"w"}
    np.testing.assert_array_equal(found.tensors["w"], SIX)
    assert not list(tmp_path.iterdir())
    assert found.meta["cfg"] == "style='caffe'"
    assert found.meta["epoch"] == 12
    assert found.meta["dataset_meta"] == {"classes": names}
    assert not {Log, Settings, np.float64} & set(map(type, found.meta.values()))

    among = pickle.dumps({**beside, "state_dict": {"w": SIX, "log": Log()}}, protocol)
    with pytest.raises(ValueError, match=r"asks for .*test_pickles\.Log; only tensors, arrays"):
        read_pickled(among)
    with pytest.raises(ValueError, match=r"asks for .*test_pickles\.Log; only tensors, arrays"):
        read_pickled(pickle.dumps(Log(), protocol))
    with pytest.raises(ValueError, match=r"'meta': not a tensor"):  # no table under a known name
        read_pickled(pickle.dumps({"meta": {}, "w": SIX}, protocol))


def test_where_the_tensors_are() -> None:
    """Under a known name; of further tables, such as a moving average, one line."""
    found = read_pickled(pickle.dumps({"epoch": 3, "model_state_dict": {"w": SIX}}))
    assert (found.tensors.keys(), found.note) == ({"w"}, "")
    both = {"state_dict": {"w": SIX}, "state_dict_ema": {"w": SIX + 1}, "optimizer": {"state": {}}}
    found = read_pickled(pickle.dumps(both))
    np.testing.assert_array_equal(found.tensors["w"], SIX)
    assert found.note == "read: state_dict; also there: 'state_dict_ema', not read"
    known = "model, state_dict, model_state_dict, teacher"
    with pytest.raises(
        ValueError, match=rf"under {known}; here they are under 'net': save that alone"
    ):
        read_pickled(pickle.dumps({"net": {"w": SIX}, "acc": 93.0, "args": argparse.Namespace()}))


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
    dtype = (
        named("numpy", "dtype")
        + b"("
        + op(code)
        + op(False)
        + op(True)
        + b"tR"
        + op((3, order, None, None, None, -1, -1, 0))
        + b"b"
    )
    raw = (
        named("_codecs", "encode")
        + b"("
        + op(SIX.tobytes().decode("latin1"))
        + op("latin1" if text else "rot13")
        + b"tR"
    )
    return EMPTY + b"(" + op(1) + op(shape) + dtype + op(False) + raw + b"tb"


EMPTY = (
    named("numpy._core.multiarray", "_reconstruct")
    + b"("
    + named("numpy", "ndarray")
    + op((0,))
    + op("b")
    + b"tR"
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
    return {
        "a deep key": b"\x80\x02})" + b"\x85" * 300_000 + op(1) + b"s.",
        "a deep value": b"\x80\x02}" + op("w") + b")" + b"\x85" * 300_000 + b"s.",
        "a large memo index": b"\x80\x02}" + op("w") + op(1) + b"r\xff\xff\xff\x7fs.",
        "a long string": b"\x80\x04}" + op("w") + b"\x8d" + struct.pack("<Q", 2**50) + b"xs.",
        "bytes that are not there": b"\x80\x04}"
        + op("w")
        + b"\x8e"
        + struct.pack("<Q", 2**63)
        + b"xs.",
        "a long frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}" + op("w") + op(1) + b"s.",
        "a long number": b"\x80\x02}" + op("w") + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"s.",
        "bytes made of one string": b"\x80\x02}("
        + op("t")
        + text
        + b"q\x09"
        + op("w")
        + b"("
        + twice
        + b"tu.",
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


@pytest.mark.parametrize("name", FILES)
def test_truncated_files(name: str) -> None:
    whole = (RECORDED / name).read_bytes()
    for size in range(len(whole)):
        with pytest.raises((ValueError, LookupError, EOFError, zipfile.BadZipFile)):
            read(whole[:size])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pickletools")
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_read_or_refused(name: str) -> None:
    """One byte of every three hundred is another: whatever is read lies in the file."""
    whole = np.frombuffer((RECORDED / name).read_bytes(), np.uint8)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = (
            np.where(
                random.random(len(whole)) < 1 / 300, random.integers(256, size=len(whole)), whole
            )
            .astype(np.uint8)
            .tobytes()
        )
        try:
            found = read(damaged)
        except Exception:
            refused += 1
        else:
            assert all(value.nbytes <= len(damaged) for value in found.values())
    assert refused > 200
