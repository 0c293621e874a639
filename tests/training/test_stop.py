"""What signals do to a command that trains, also while its main thread hears nothing."""

from __future__ import annotations

import hashlib
import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mrcnn_jax import cli
from mrcnn_jax.training import stop as stopping
from mrcnn_jax.training.open import Progress
from mrcnn_jax.training.stop import StopSignal

_started = time.perf_counter()
hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
A_SECOND = int(100_000 / (time.perf_counter() - _started))  # iterations on this machine


@pytest.fixture(autouse=True)
def foreground() -> Iterator[None]:
    """Signals as a command in the foreground has them: one in the background ignores SIGINT, and
    one that nohup started SIGHUP."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Left(Exception):
    """Ends the thread that would end the process."""


def busy_while(*signals: int, unsaved: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """([signal that ended the process, whether in the call], what came of saving) if the signals
    arrive while the main thread is in one long call, as of the compiler."""
    left: list[tuple[int, bool]] = []
    answered, busy = threading.Event(), True

    def leave(number: int, line: str) -> None:
        cli.say(line)
        left.append((number, busy))
        answered.set()
        raise Left

    def send() -> None:
        for number in signals:
            os.kill(os.getpid(), number)
            answered.wait(0.1)

    run: Any = SimpleNamespace(
        config=SimpleNamespace(save_every_steps=100, stages=[SimpleNamespace(name="rpn")]),
        workdir="run",
    )
    monkeypatch.setattr(cli, "in_charge", True)
    monkeypatch.setattr(cli, "leave", leave)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    heard = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in heard]
    stopped = None
    with StopSignal(run) as stop:
        stop.unsaved = unsaved
        sender = threading.Timer(0.1, send)
        sender.start()
        seconds = len(signals)  # on a busy machine, too
        hashlib.pbkdf2_hmac("sha256", b"", b"", seconds * A_SECOND)  # no instruction of Python
        busy = False
        sender.join()
        if stop.save_is_due(Progress(0, 7)):
            with pytest.raises(cli.Stopped) as error:
                stop.obey(Progress(0, 7))
            stopped = error.value.number, str(error.value)
    assert [signal.getsignal(number) for number in heard] == before
    assert signal.set_wakeup_fd(-1) == -1
    return left, stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left, stopped = busy_while(number, unsaved=True, monkeypatch=monkeypatch)
    assert left == []
    assert stopped == (number, f"stopped by {number.name}: stage rpn, step 7 is saved in run")
    again = "; again to leave at once" if number == signal.SIGINT else ""
    said = "" if number == signal.SIGHUP else f"saving after this step{again}\n"
    assert capsys.readouterr().err == said


def test_what_is_written_to_a_terminal_that_is_gone_is_discarded() -> None:
    """Else the first line after SIGHUP would end the run before it is saved."""
    code = (
        "import sys, time\n"
        "from mrcnn_jax import cli\n"
        "print('begun', flush=True)\n"
        "sys.stdin.read()\n"  # until the terminal is gone
        "try:\n"
        "    print('lost', flush=True)\n"
        "except OSError:\n"
        "    cli.leave_terminal()\n"
        "    print('discarded', flush=True)\n"
        "    open(sys.argv[1], 'w').write('saved')\n"
    )
    ours, theirs = pty.openpty()
    with (
        tempfile.NamedTemporaryFile() as file,
        subprocess.Popen(
            [sys.executable, "-c", code, file.name],
            stdin=subprocess.PIPE,
            stdout=theirs,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process,
    ):
        os.close(theirs)
        shown = b""
        while not shown.endswith(b"\n"):
            shown += os.read(ours, 99)
        os.close(ours)
        process.stdin.close()  # type: ignore[union-attr]
        assert process.wait(60) == 0, process.stderr.read()
        assert file.read() == b"saved"


def test_work_is_saved_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where steps are so slow that few are done in ten minutes."""
    now = 1000.0
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now))
    run: Any = SimpleNamespace(config=SimpleNamespace(save_every_steps=100))
    stop = StopSignal(run)
    for seconds, due, much in ((0, False, False), (119, False, False), (120, False, True)):
        now = 1000.0 + seconds
        assert (stop.save_is_due(Progress(0, 7)), stop.much_is_unsaved) == (due, much)
    now = 1600.0
    assert stop.save_is_due(Progress(0, 7))
    stop.obey(Progress(0, 7))
    assert (stop.save_is_due(Progress(0, 8)), stop.much_is_unsaved) == (False, False)
    assert stop.save_is_due(Progress(0, 100))


def test_a_second_ctrl_c_leaves_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the first one after SIGTERM."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGINT)
    left, _ = busy_while(*numbers, unsaved=True, monkeypatch=monkeypatch)
    assert left == [(signal.SIGINT, True)]
    assert capsys.readouterr().err.splitlines()[1:] == [
        "saving after this step; again to leave at once",
        "interrupted: what was trained since the last checkpoint is lost",
    ]


def test_ctrl_c_with_nothing_to_save_leaves_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left, _ = busy_while(signal.SIGINT, unsaved=False, monkeypatch=monkeypatch)
    assert left == [(signal.SIGINT, True)]
    assert capsys.readouterr().err == "interrupted: nothing is lost\n"


def test_a_notebook_and_the_background_keep_their_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = None
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # of nohup
    for in_charge, handler in ((False, signal.default_int_handler), (True, signal.SIG_IGN)):
        monkeypatch.setattr(cli, "in_charge", in_charge)
        before = signal.signal(signal.SIGINT, handler)
        try:
            with StopSignal(run):
                assert signal.getsignal(signal.SIGINT) is handler
                assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)
