"""A trace of a few steps of each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

# Steps of a stage that are traced, counted from 1 since this process began it: the first compile.
FIRST, LAST = 5, 9


class Profiler:
    """Traces steps FIRST to LAST of each stage, or as many as there are, into `folder`/<stage>."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stage, self._done, self._tracing = folder, "", 0, False

    def begin(self, stage: str) -> None:
        self.end()
        self._stage, self._done = stage, 0

    def step(self, result: Any) -> None:
        """Call it after each step is dispatched, with its future results."""
        self._done += 1
        if self._done == FIRST - 1:
            jax.block_until_ready(result)  # this step does not belong to the trace
            jax.profiler.start_trace(self._folder / self._stage, create_perfetto_trace=True)
            self._tracing = True
        elif self._done == LAST:
            jax.block_until_ready(result)
            self.end()

    def end(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            print(f"trace: {self._folder / self._stage}")
