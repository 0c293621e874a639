"""When a run is saved: in time, and first of all when SIGTERM, SIGHUP or Ctrl-C end it."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from types import FrameType

import jax
from jax.experimental import multihost_utils

from mrcnn_jax import cli
from mrcnn_jax.training.open import OpenRun, Progress

SAVE_AFTER = 600.0  # seconds of work: what a power cut may cost at most
MUCH = 120.0  # seconds of work: worth a checkpoint before a validation, which may not fit


class StopSignal:
    """SIGTERM, SIGHUP (the terminal is gone), and Ctrl-C of a command, noted until the end of a
    step.

    A second Ctrl-C ends the command at once, and so does the first one while there is nothing to
    save. Outside of a command (in a notebook) Ctrl-C stays Python's own, and so does SIGHUP where
    nohup has it ignored. Of several processes JAX handles SIGTERM, and they stop at a step that all
    agree on.
    """

    def __init__(self, run: OpenRun) -> None:
        self._run, self._alone = run, jax.process_count() == 1
        self._hears = ExitStack()
        self._number: int | None = None
        self._interrupted = False
        self._saved = time.monotonic()
        self.unsaved = False
        """Whether a step was done since the last checkpoint: the loop says so."""

    def __enter__(self) -> StopSignal:
        if self._alone:
            numbers = [signal.SIGTERM, *([signal.SIGINT] if cli.takes_ctrl_c() else [])]
            if cli.in_charge and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
                numbers.append(signal.SIGHUP)
            self._hears.enter_context(cli.hear(numbers, self._note, self._answer))
        return self

    def __exit__(self, *_: object) -> None:
        self._hears.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def _answer(self, number: int) -> None:
        if number == signal.SIGHUP:
            cli.leave_terminal()
        elif number == signal.SIGTERM:
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
        due = progress.step % self._run.config.save_every_steps == 0 or self._number is not None
        return due or self._worked_for(SAVE_AFTER)

    @property
    def much_is_unsaved(self) -> bool:
        """Whether more work than a checkpoint costs would be lost now."""
        return self._worked_for(MUCH)

    def _worked_for(self, seconds: float) -> bool:
        """Whether so much time has passed since the last checkpoint; never with several processes,
        whose clocks may differ."""
        return self._alone and time.monotonic() - self._saved >= seconds

    @property
    def is_asked(self) -> bool:
        """Whether a signal has arrived, of which all processes know."""
        return self._number is not None

    def obey(self, progress: Progress) -> None:
        """Raises Stopped if a signal has arrived; call it after saving."""
        self.unsaved, self._saved = False, time.monotonic()
        if self._number is not None:
            stage = self._run.config.stages[progress.stage_index].name
            raise cli.Stopped(
                f"stopped by {signal.Signals(self._number).name}: stage {stage}, step "
                f"{progress.step} is saved in {self._run.workdir}",
                self._number,
            )
