"""The devices that train, as far as choices depend on them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import jax

from mrcnn_jax import parallel
from mrcnn_jax.training.memory import device_memory

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Devices:
    """What trains."""

    kind: Device
    count: int = 1
    """A batch is spread over so many, evenly."""
    memory: int | None = None
    """Bytes that training may take on each; None: not known."""
    cores: int = 2
    """Of the processor, which load images."""


def devices_here() -> Devices:
    """Those of this process and of all that train with it, each of which calls this."""
    known = [bytes_ for bytes_ in parallel.gather(device_memory()) if bytes_ is not None]
    return Devices(
        kind="cpu" if jax.default_backend() == "cpu" else "gpu",
        count=jax.device_count(),
        memory=min(known, default=None),
        cores=len(os.sched_getaffinity(0)),
    )
