"""Files of named tensors: .npz, .safetensors, and pickles (.pth, .pt, .pkl, .pth.tar)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from mrcnn_jax.config.errors import ConfigError, refuse_pipe
from mrcnn_jax.weights.npz import read_npz
from mrcnn_jax.weights.pickles import Pickled, read_pickled

SUFFIXES = (".pth", ".pt", ".pkl", ".pth.tar", ".safetensors", ".npz")
_PARALLEL = "module."  # prefix of every name in torch's DataParallel


class TensorFile(NamedTuple):
    """Content of a file."""

    tensors: Mapping[str, np.ndarray]
    """By name, without the prefix "module." that torch's DataParallel gives to all."""
    meta: Mapping[Any, Any]
    """As of `pickles.Pickled`; of other formats {}."""
    note: str = ""
    """As of `pickles.Pickled`."""


def read_tensors(path: Path) -> TensorFile:
    """Reads the named tensors of a file in the format that its suffix, one of SUFFIXES, says.

    Raises:
        ConfigError: the file is missing, of another format, damaged, or holds no tensors.
    """
    suffix = next(filter(path.name.endswith, SUFFIXES), None)
    if suffix is None:
        raise ConfigError(f"{path}: weights files are {', '.join(SUFFIXES)}")
    refuse_pipe(path)
    try:
        tensors, meta, note = _read(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such weights file") from None
    except Exception as error:  # a damaged or hostile file can raise any
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"refers to {reason}, which is not in it"
        raise ConfigError(f"{path}: not a readable {suffix} file: {reason:.300}") from None
    if not tensors:
        raise ConfigError(f"{path}: holds no tensors")
    if all(name.startswith(_PARALLEL) for name in tensors):
        tensors = {name.removeprefix(_PARALLEL): tensor for name, tensor in tensors.items()}
    return TensorFile(tensors, meta, note)


def _read(path: Path) -> Pickled:
    if path.suffix == ".npz":
        return Pickled(read_npz(path), {})
    if path.suffix == ".safetensors":
        return Pickled(safetensors.numpy.load_file(path), {})
    return read_pickled(path.read_bytes())
