"""The trace that --profile writes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from mrcnn_jax.training.profiler import FIRST, LAST, Profiler


def events_of_steps(folder: Path) -> int:
    """How many events of a trace are of `traced_step`."""
    (path,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum(event.get("name") == "PjitFunction(traced_step)" for event in events)


def test_some_steps_of_each_stage_are_traced(tmp_path: Path) -> None:
    @jax.jit
    def traced_step(x: jax.Array) -> jax.Array:
        return x @ x

    profiler, state = Profiler(tmp_path), jnp.eye(20)
    for stage, count in (("rpn", LAST + 3), ("box", FIRST + 1), ("mask", FIRST - 2)):
        profiler.begin(stage)
        for _ in range(count):
            state = traced_step(state)
            profiler.step(state)
    profiler.end()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "box",
        "rpn",
    ]  # the last stage was over before
    traced = {stage: events_of_steps(tmp_path / stage) for stage in ("rpn", "box")}
    assert traced["rpn"] > 0
    assert traced["rpn"] * 2 == traced["box"] * (
        LAST - FIRST + 1
    )  # a step leaves the same number of events everywhere
