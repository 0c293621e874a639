"""Pickles are read as torch and NumPy write them. What they may not do: test_pickle_machine.py."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.weights.pickles import read_pickled
from tests.weights.made_pickles import SIX, Command, archive, op, storage, stream, table, tensor

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


@pytest.mark.parametrize("make", [archive, stream])
def test_a_number_names_no_tensor(make: Callable[..., bytes]) -> None:
    content = b"\x80\x02}(" + op(0) + tensor() + b"u."
    with pytest.raises(ValueError, match="0: not a tensor's name"):
        read(make(content, {"0": SIX.tobytes()}))


@pytest.mark.parametrize("make", [archive, stream])
def test_by_hand(make: Callable[..., bytes]) -> None:
    """The file that the hostile ones of test_pickle_machine.py are made from is read."""
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
