"""SIGTERM and Ctrl-C while a run trains: what is trained is saved first."""

from __future__ import annotations

import os
import signal
import sys
from threading import Thread
from types import FrameType

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

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
        self._number: int | None = None
        self.unsaved = False
        """Whether a step was done since the last checkpoint: the loop says so."""

    def __enter__(self) -> StopSignal:
        command = self._alone and cli.in_charge
        numbers = [signal.SIGTERM] * self._alone + [signal.SIGINT] * command
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        if command:
            # Python calls a handler when the main thread is between two of its instructions; it may
            # be in the compiler for minutes. Hence another thread answers.
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            Thread(target=self._answer, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if signal.SIGINT in self._handlers:
            signal.set_wakeup_fd(self._before)
            os.close(self._writer)  # which ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def _answer(self, reader: int) -> None:
        """Says what comes of each signal, a byte in the pipe, or ends the process."""
        interrupted = False
        with open(reader, "rb", buffering=0) as signals:
            while number := int.from_bytes(signals.read(1)):
                again = number == signal.SIGINT
                if again and not self.unsaved:
                    _say("interrupted: nothing is lost")
                    cli.leave(128 + number)
                elif again and interrupted:
                    _say("interrupted: what was trained since the last checkpoint is lost")
                    cli.leave(128 + number)
                elif number in self._handlers:
                    _say("saving after this step" + "; again to leave at once" * again)
                interrupted |= again

    def save_is_due(self, progress: Progress) -> bool:
        """Whether the step just done is to be saved; call it once after each step."""
        agreed = multihost_utils.reached_preemption_sync_point
        if not self._alone and agreed(self._run.steps_done(progress)):
            self._number = signal.SIGTERM
        return progress.step % self._run.config.save_every_steps == 0 or self._number is not None

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


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()
