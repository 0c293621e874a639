"""A file of tensors is read by its suffix; whatever is wrong with it is one line that names it."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.weights import tensors as files

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.bias": np.arange(3, dtype=np.float16),
}


def read(path: Path) -> Mapping[str, np.ndarray]:
    return files.read_tensors(path).tensors


SUFFIXES = (".npz", ".safetensors", ".pkl", ".pth", ".pt", ".pth.tar")


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **tensors)  # type: ignore[arg-type]
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(tensors, path)
    else:
        path.write_bytes(pickle.dumps(tensors))
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_each_kind(suffix: str, prefix: str, tmp_path: Path) -> None:
    found = read(
        write(
            tmp_path / f"weights{suffix}",
            {prefix + name: tensor for name, tensor in TENSORS.items()},
        )
    )
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


def test_bfloat16_of_safetensors(tmp_path: Path) -> None:
    values = np.arange(5).astype(jnp.bfloat16)
    found = read(write(tmp_path / "weights.safetensors", {"a": values}))["a"]
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_a_prefix_that_some_names_have_stays(tmp_path: Path) -> None:
    tensors = {"module.a": TENSORS["a.weight"], "b": TENSORS["b.bias"]}
    assert read(write(tmp_path / "weights.npz", tensors)).keys() == tensors.keys()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_are_none(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"absent{suffix}: no such weights file"):
        read(tmp_path / f"absent{suffix}")
    whole = write(tmp_path / f"whole{suffix}", TENSORS).read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", a=np.array([None]))
    bad = {
        "text": b"not what it is called\n",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "array": (tmp_path / "array.npy").read_bytes(),
        "objects": (tmp_path / "objects.npz").read_bytes(),
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        with pytest.raises(
            ConfigError,
            match=rf"{name}{re.escape(suffix)}: not a readable {re.escape(suffix)} file: .",
        ) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"hello")  # asks a pickle for its entry 101
    with pytest.raises(ConfigError, match=r"refers to 101|readable .(npz|safetensors) file"):
        read(path)
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(ConfigError, match="not a readable"):
        read(tmp_path / f"folder{suffix}")
    with pytest.raises(ConfigError, match="holds no tensors"):
        read(write(tmp_path / f"none{suffix}", {}))


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"weights\.h5: weights files are \.pth, \.pt, \.pkl, \.pth\.tar, \.safetensors, ",
    ):
        read(tmp_path / "weights.h5")
