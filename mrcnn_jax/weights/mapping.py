"""Maps other projects' tensors to our variables: declarative, applied in full or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import listed
from mrcnn_jax.runs.finite import fault_of, is_variance

Layout = Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    """Sends source tensors whose whole name matches `pattern` to the path `target`."""

    pattern: str
    target: str  # "params/resnet/layer1/block0/conv1/kernel"; may use groups (re.Match.expand)
    layouts: tuple[Layout, ...] = ()  # applied one after the other


class Assigned(NamedTuple):
    """The source tensor of a target, and how it is rearranged."""

    name: str
    layouts: tuple[Layout, ...]


# -- layouts: theirs to ours -----------------------------------------------------------------------
# They raise ValueError for a tensor that does not have the rank or sizes expected.


def convolution(x: Float[np.ndarray, "o i h w"]) -> Float[np.ndarray, "h w i o"]:
    return x.transpose(2, 3, 1, 0)


def transposed_convolution(x: Float[np.ndarray, "i o h w"]) -> Float[np.ndarray, "h w i o"]:
    """Flips no axis, since both scatter: out[stride * y + ky] += kernel[ky] x[y]."""
    return x.transpose(2, 3, 0, 1)


def pointwise(x: Float[np.ndarray, "o i 1 1"]) -> Float[np.ndarray, "i o"]:
    """Turns a 1x1 convolution into a Dense."""
    return x.reshape(x.shape[:2]).T


def linear(x: Float[np.ndarray, "o i"]) -> Float[np.ndarray, "i o"]:
    return x.transpose(1, 0)


def linear_of_7x7(x: Float[np.ndarray, "o c*7*7"]) -> Float[np.ndarray, "7*7*c o"]:
    """Reorders inputs of the first fully connected layer, from channels first to channels last."""
    return x.reshape(len(x), -1, 7, 7).transpose(2, 3, 1, 0).reshape(-1, len(x))


def bgr_input(x: Float[np.ndarray, "h w 3 o"]) -> Float[np.ndarray, "h w 3 o"]:
    """Turns a kernel of our layout from BGR to RGB images."""
    return x[:, :, ::-1]


def without_background(x: Float[np.ndarray, "k+1 ..."]) -> Float[np.ndarray, "k ..."]:
    """Drops the background's mask, which comes first: only foreground classes have one here."""
    return x[1:]


def without_background_box(x: Float[np.ndarray, "4*(k+1) ..."]) -> Float[np.ndarray, "4*k ..."]:
    return x[4:]


def background_first(x: Float[np.ndarray, "k+1 ..."]) -> Float[np.ndarray, "k+1 ..."]:
    """Moves the background's class logit from the end to the front."""
    return np.roll(x, 1, axis=0)


# -- applying a map --------------------------------------------------------------------------------


def assign(
    names: Iterable[str], rules: Sequence[Rule], left_out: Collection[str], source: str
) -> dict[str, Assigned]:
    """Finds the source of every target, by names alone.

    Args:
        names: names of the source tensors.
        rules: the map.
        left_out: patterns of names that are left out on purpose.
        source: name of the file, for messages.

    Returns:
        Path of a variable -> its source.

    Raises:
        ConfigError: names the tensor that no rule or two rules match, or whose target is taken.
    """
    assigned: dict[str, Assigned] = {}
    for name in names:
        if any(re.fullmatch(pattern, name) for pattern in left_out):
            continue
        matches = [(rule, match) for rule in rules if (match := re.fullmatch(rule.pattern, name))]
        if len(matches) != 1:
            reason = "two rules of the map match it" if matches else "unknown tensor"
            raise ConfigError(f"{source}: {name}: {reason}")
        ((rule, match),) = matches
        target = match.expand(rule.target)
        if target in assigned:
            raise ConfigError(
                f"{source}: {name}: {target} was filled by {assigned[target].name} already"
            )
        assigned[target] = Assigned(name, rule.layouts)
    return assigned


def fill(
    template: Mapping[str, Any],
    assigned: Mapping[str, Assigned],
    tensors: Mapping[str, np.ndarray],
    source: str,
) -> dict[str, Any]:
    """Fills variables with tensors.

    Args:
        template: nested dicts of arrays or shapes.
        assigned: source of each variable, from `assign`.
        tensors: the source tensors by name.
        source: name of the file, for messages.

    Returns:
        Variables as in `template`, every leaf NumPy float32.

    Raises:
        ConfigError: names the tensor that has no place in the template, another shape, no
            floating-point dtype or numbers that are not finite; or the variables that no tensor
            fills.
    """
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten_dict(template, sep="/").items()}
    filled: dict[str, np.ndarray] = {}
    for target, (name, layouts) in assigned.items():
        if target not in wanted:
            raise ConfigError(f"{source}: {name}: this model has no {target}")
        tensor = tensors[name]
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ConfigError(f"{source}: {name}: dtype {tensor.dtype} is not floating point")
        value = tensor
        try:
            for layout in layouts:
                value = layout(value)
            fits = value.shape == wanted[target]
        except ValueError:
            fits = False
        if not fits:
            raise ConfigError(
                f"{source}: {name}: shape {tensor.shape} does not fit {target} {wanted[target]}"
            )
        with np.errstate(over="ignore"):  # of float64: named below
            filled[target] = np.ascontiguousarray(value, dtype=np.float32)
        fault = fault_of(filled[target], is_variance=is_variance(target))
        if fault is not None:
            raise ConfigError(f"{source}: {name}: {fault}")
    missing = [path for path in wanted if path not in filled]
    if missing:
        raise ConfigError(f"{source}: no tensor for {listed(missing)}")
    return unflatten_dict(filled, sep="/")
