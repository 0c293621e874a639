"""What a train step takes and gives back, and what a checkpoint holds."""

from __future__ import annotations

from typing import Any

import flax.struct
from jaxtyping import Array, Int32, UInt32

from mrcnn_jax.structures import Params


class TrainState(flax.struct.PyTreeNode):
    """The state of one stage. `opt_state` belongs to the stage's optimiser; all else carries over to the next stage."""

    params: Params
    batch_stats: Params
    opt_state: Any
    step: Int32[Array, ""]  # steps done within the stage
    key: UInt32[Array, " words"]  # `jax.random.key_data` of the stage's key
