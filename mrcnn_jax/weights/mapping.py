"""How tensors of another project become our variables: a declarative map a family, applied in full
or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from mrcnn_jax.config.errors import ConfigError

Layout = Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    """Source tensors whose name fully matches `pattern` go to the path `target`, with groups as in
    `re.Match.expand`."""

    pattern: str
    target: str  # "params/resnet/layer1/block0/conv1/kernel"
    layouts: tuple[Layout, ...] = ()  # applied one after the other; none: as it is


class Assigned(NamedTuple):
    """Where a target's values come from."""

    name: str
    layouts: tuple[Layout, ...]


# -- layouts: theirs to ours -----------------------------------------------------------------------
# A tensor of another rank or kind than a layout is made for raises ValueError.


def convolution(x: Float[np.ndarray, "o i h w"]) -> Float[np.ndarray, "h w i o"]:
    return x.transpose(2, 3, 1, 0)


def transposed_convolution(x: Float[np.ndarray, "i o h w"]) -> Float[np.ndarray, "h w i o"]:
    """Both scatter: out[stride * y + ky] += kernel[ky] x[y], so that no axis is flipped."""
    return x.transpose(2, 3, 0, 1)


def pointwise(x: Float[np.ndarray, "o i 1 1"]) -> Float[np.ndarray, "i o"]:
    """A 1x1 convolution is our Dense."""
    return x.reshape(x.shape[:2]).T


def linear(x: Float[np.ndarray, "o i"]) -> Float[np.ndarray, "i o"]:
    return x.transpose(1, 0)


def linear_of_7x7(x: Float[np.ndarray, "o c*7*7"]) -> Float[np.ndarray, "7*7*c o"]:
    """The first fully connected layer: RoI features are flattened channel first there, channel last
    here."""
    return x.reshape(len(x), -1, 7, 7).transpose(2, 3, 1, 0).reshape(-1, len(x))


def bgr_input(x: Float[np.ndarray, "h w 3 o"]) -> Float[np.ndarray, "h w 3 o"]:
    """A kernel (of our layout) for BGR images, for RGB images."""
    return x[:, :, ::-1]


def without_background(x: Float[np.ndarray, "k+1 ..."]) -> Float[np.ndarray, "k ..."]:
    """Masks exist for foreground classes only; the background's comes first."""
    return x[1:]


def without_background_box(x: Float[np.ndarray, "4*(k+1) ..."]) -> Float[np.ndarray, "4*k ..."]:
    return x[4:]


def background_first(x: Float[np.ndarray, "k+1 ..."]) -> Float[np.ndarray, "k+1 ..."]:
    """Class logits whose background comes last."""
    return np.roll(x, 1, axis=0)


# -- the map's application -------------------------------------------------------------------------


def assign(
    names: Iterable[str], rules: Sequence[Rule], left_out: Collection[str], source: str
) -> dict[str, Assigned]:
    """The source of every target, by the names alone.

    Args:
        left_out: patterns of the names that are left out on purpose.
        source: the file's name.

    Raises:
        ConfigError: names the source and the tensor that no rule or two rules know, or the target
            that two tensors have.
    """
    assigned: dict[str, Assigned] = {}
    for name in names:
        if any(re.fullmatch(pattern, name) for pattern in left_out):
            continue
        matches = [(rule, match) for rule in rules if (match := re.fullmatch(rule.pattern, name))]
        if len(matches) != 1:
            raise ConfigError(
                f"{source}: {name}: {'unknown tensor' if not matches else 'two rules of the map match it'}"
            )
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
    """Variables shaped as `template` (a nested dict of things with a shape), every leaf float32 and
    from `tensors`.

    Raises:
        ConfigError: names the source and the tensor that has no place in the template, another
            shape or no floating-point dtype; or the leaf that stays empty.
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
        filled[target] = np.ascontiguousarray(value, dtype=np.float32)
    missing = [path for path in wanted if path not in filled]
    if missing:
        raise ConfigError(
            f"{source}: no tensor for {', '.join(missing[:3])}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}"
        )
    return unflatten_dict(filled, sep="/")
