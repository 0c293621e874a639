"""Files of named tensors: .npz, .safetensors, and torch's and detectron2's .pth, .pt, .pkl."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.numpy

from mrcnn_jax.config.errors import ConfigError, refuse_pipe
from mrcnn_jax.weights.npz import read_npz
from mrcnn_jax.weights.pickles import read_pickled

SUFFIXES = (".pth", ".pt", ".pkl", ".safetensors", ".npz")
_PARALLEL = "module."  # prefix of every name in torch's DataParallel


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads the named tensors of a file in the format that its suffix, one of SUFFIXES, says.

    Raises:
        ConfigError: the file is missing, of another format, damaged, or holds no tensors.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: weights files are {', '.join(SUFFIXES)}")
    refuse_pipe(path)
    try:
        tensors = _read(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such weights file") from None
    except Exception as error:  # a damaged or hostile file can raise any
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"refers to {reason}, which is not in it"
        raise ConfigError(f"{path}: not a readable {path.suffix} file: {reason:.300}") from None
    if not tensors:
        raise ConfigError(f"{path}: holds no tensors")
    if all(name.startswith(_PARALLEL) for name in tensors):
        return {name.removeprefix(_PARALLEL): tensor for name, tensor in tensors.items()}
    return tensors


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix == ".safetensors":
        return safetensors.numpy.load_file(path)
    return read_pickled(path.read_bytes())
