"""The state that a train step updates and a checkpoint stores."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt32

from mrcnn_jax.structures import Params


class TrainState(flax.struct.PyTreeNode):
    """The state of one stage; `params` and `batch_stats` carry over to the next one."""

    params: Params
    batch_stats: Params
    opt_state: Any
    step: Int32[Array, ""]  # steps done within the stage, skipped ones included
    key: UInt32[Array, " words"]  # `jax.random.key_data` of the stage's key
    # Steps of the stage that were not applied because loss or gradient was not finite.
    skipped: Int32[Array, ""] = flax.struct.field(default_factory=lambda: jnp.int32(0))
    # Moving average of the trained parameters: a subtree of `params`, or empty.
    ema: Params = flax.struct.field(default_factory=dict)
