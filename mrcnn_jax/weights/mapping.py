"""How tensors of another project become our variables: a declarative map a family, applied in full or not at all."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mrcnn_jax.config import ConfigError


class Rule(NamedTuple):
    """Source tensors whose name fully matches `pattern` go to the path `target`, with groups as in `re.Match.expand`."""

    pattern: str
    target: str  # "params/layer1/block0/conv1/kernel"
    transpose: tuple[int, ...] | None = None  # axes of the source in the order of ours; None: as it is


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The named arrays of a flat npz file; ConfigError if it is not one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such weights file") from None
    except (OSError, EOFError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: not a readable npz file: {error}") from None


def map_tensors(
    tensors: Mapping[str, np.ndarray], rules: Sequence[Rule], left_out: Sequence[str], template: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Variables shaped as `template` (a nested dict of things with a shape), every leaf float32 and from `tensors`.

    `left_out` are patterns of the names that are left out on purpose; `source` is the file's name.

    Raises:
        ConfigError: names the source and the tensor that no rule or two rules know, that has no place in the template, another shape
            or no floating-point dtype; or the leaf that stays empty.
    """
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten_dict(template, sep="/").items()}
    origin: dict[str, str] = {}
    filled: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in left_out):
            continue
        matches = [(rule, match) for rule in rules if (match := re.fullmatch(rule.pattern, name))]
        if len(matches) != 1:
            raise ConfigError(f"{source}: {name}: {'unknown tensor' if not matches else 'two rules of the map match it'}")
        ((rule, match),) = matches
        target = match.expand(rule.target)
        if target not in wanted:
            raise ConfigError(f"{source}: {name}: this model has no {target} (other depth?)")
        if target in filled:
            raise ConfigError(f"{source}: {name}: {target} was filled by {origin[target]} already")
        if not np.issubdtype(tensor.dtype, np.floating):
            raise ConfigError(f"{source}: {name}: dtype {tensor.dtype} is not floating point")
        fits = rule.transpose is None or tensor.ndim == len(rule.transpose)
        value = tensor.transpose(rule.transpose) if rule.transpose is not None and fits else tensor
        if not fits or value.shape != wanted[target]:
            raise ConfigError(f"{source}: {name}: shape {tensor.shape} does not fit {target} {wanted[target]}")
        filled[target] = np.ascontiguousarray(value, dtype=np.float32)
        origin[target] = name
    missing = [path for path in wanted if path not in filled]
    if missing:
        raise ConfigError(f"{source}: no tensor for {', '.join(missing[:3])}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}")
    return unflatten_dict(filled, sep="/")
