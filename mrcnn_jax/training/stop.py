"""SIGTERM and Ctrl-C while a run trains: what is trained is saved first."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from types import FrameType

import jax
from jax.experimental import multihost_utils

from mrcnn_jax import cli
from mrcnn_jax.training.open import OpenRun, Progress


class StopSignal:
    """SIGTERM, and Ctrl-C of a command, noted until the end of a step.

    A second Ctrl-C ends the command at once, and so does the first one while there is nothing to
    save. Outside of a command (in a notebook) Ctrl-C stays Python's own. Of several processes JAX
    handles SIGTERM, and they stop at a step that all agree on.
    """

    def __init__(self, run: OpenRun) -> None:
        self._run, self._alone = run, jax.process_count() == 1
        self._hears = ExitStack()
        self._number: int | None = None
        self._interrupted = False
        self.unsaved = False
        """Whether a step was done since the last checkpoint: the loop says so."""

    def __enter__(self) -> StopSignal:
        if self._alone:
            numbers = [signal.SIGTERM, *([signal.SIGINT] if cli.takes_ctrl_c() else [])]
            self._hears.enter_context(cli.hear(numbers, self._note, self._answer))
        return self

    def __exit__(self, *_: object) -> None:
        self._hears.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def _answer(self, number: int) -> None:
        if number == signal.SIGTERM:
            cli.say("saving after this step")
        elif not self.unsaved:
            cli.leave(number, "interrupted: nothing is lost")
        elif self._interrupted:
            cli.leave(number, "interrupted: what was trained since the last checkpoint is lost")
        else:
            self._interrupted = True
            cli.say("saving after this step; again to leave at once")

    def save_is_due(self, progress: Progress) -> bool:
        """Whether the step just done is to be saved; call it once after each step."""
        agreed = multihost_utils.reached_preemption_sync_point
        if not self._alone and agreed(self._run.steps_done(progress)):
            self._number = signal.SIGTERM
        return progress.step % self._run.config.save_every_steps == 0 or self._number is not None

    @property
    def is_asked(self) -> bool:
        """Whether a signal has arrived, of which all processes know."""
        return self._number is not None

    def obey(self, progress: Progress) -> None:
        """Raises Stopped if a signal has arrived; call it after saving."""
        self.unsaved = False
        if self._number is not None:
            stage = self._run.config.stages[progress.stage_index].name
            raise cli.Stopped(
                f"stopped by {signal.Signals(self._number).name}: stage {stage}, step "
                f"{progress.step} is saved in {self._run.workdir}",
                self._number,
            )
