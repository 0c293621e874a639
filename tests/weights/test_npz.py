"""Arrays of .npz files come back as NumPy reads them; what lies about its size is not unpacked."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mrcnn_jax.weights import npz

ARRAYS = {
    "a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big": np.arange(3, dtype=">f4"),
    "scalar": np.array(2, np.int16),
    "none": np.zeros((0, 4), np.float16),
    "text": np.array("text"),
    "truth": np.array([True, False]),
    "x.npy": np.ones(2),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_it_reads_what_numpy_reads(save: object, tmp_path: Path) -> None:
    path = tmp_path / "arrays.npz"
    save(path, **ARRAYS)  # type: ignore[operator]
    found = npz.read_npz(path)
    with np.load(path) as theirs:
        assert list(found) == theirs.files
        for name, array in found.items():
            assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape)
            np.testing.assert_array_equal(array, theirs[name])


def test_weights_that_are_all_alike_may_shrink_much(tmp_path: Path) -> None:
    """A fresh network of zeros is a right file: 40 MB in 40 KB."""
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(10_000_000, np.float32))
    assert npz.read_npz(tmp_path / "zeros.npz")["a"].size == 10_000_000


def member(array: np.ndarray, shape: str | None = None) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    content = file.getvalue()
    if shape is None:
        return content
    old = str(array.shape)  # what follows it is padded
    return content.replace(f"{old}, }}".ljust(len(shape) + 3).encode(), f"{shape}, }}".encode())


HUGE = "(1000000000000,)"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (member(np.zeros(3), HUGE), "an array of 8000000000000 bytes in 152"),
        (member(np.zeros(3), "(-3,)"), "shape"),
        (member(np.array([None])), "arrays of object are refused"),
        (member(np.zeros(2, "i4,f4")), "are refused"),
        (member(np.zeros(3)) + b"0", "not the 24 bytes"),
        (member(np.zeros(3))[:-1], "not the 24 bytes"),
        (b"not an array", "magic string is not correct"),
        (member(np.zeros(5000)), "would unpack to 40128 bytes, more than 20000"),
    ],
)
def test_what_is_refused(
    content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "_LEAST_LIMIT", 20_000)
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(ValueError, match=reason):
        npz.read_npz(path)


def test_two_arrays_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", member(np.zeros(3)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", member(np.ones(3)))
    with pytest.raises(ValueError, match="two arrays have one name"):
        npz.read_npz(path)
