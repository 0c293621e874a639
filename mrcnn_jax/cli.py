"""Exit statuses and one-line errors of the commands, and the names under which they are called."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import multiprocessing
import os
import re
import select
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import NoReturn, TextIO

from tqdm import tqdm

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import PrintableStream, printable

COMPILED_BYTES = 2 << 30
"""Size of the cache of compiled programs; those not used for the longest time go first."""

SCRIPTS = ("train", "eval", "predict")  # also files of a checkout: python train.py

in_charge = False
"""Whether this process is that of a command (`run`), which may end it."""

leave_after: float | None = None
"""Seconds after which a command that fails ends, without waiting for threads and exit handlers: of
several processes, the others learn of it only then."""


class Failure(RuntimeError):
    """The work failed for a reason that one line explains: exit status 1."""


class Stopped(Exception):
    """The work was stopped by a signal, and its state is saved: exit status 128 + its number."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def run(main: Callable[[], object]) -> None:
    """Calls `main` and exits as its end requires.

    A ConfigError becomes one line on stderr and exit status 2; a `Failure`, a full disk and any
    other file that cannot be read or written, status 1; `Stopped` a line on stdout and status 143,
    129 or 130; Ctrl-C a line and status 130; a reader that has left (`| head`) status 141. Closed
    streams are none: a closed stdout is refused, for what a command finds must not be lost in
    silence.
    """
    global in_charge
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _keep_compiled_programs()
    _open_streams()
    in_charge = True
    try:
        try:
            main()
        except Stopped as stopped:
            print(printable(str(stopped)), flush=True)
            sys.exit(128 + stopped.number)
        except SystemExit:  # of tyro, or of a command that said why
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except (ConfigError, Failure) as error:
        _fail(2 if isinstance(error, ConfigError) else 1, str(error))
    except KeyboardInterrupt:
        _fail(130, "interrupted", start="")
    except MemoryError:
        _fail(1, "out of memory")
    except OSError as error:
        lost = lost_output()
        if isinstance(lost, BrokenPipeError):
            _fail(141)
        elif lost is not None:
            _fail(1, f"standard output: {lost.strerror}")
        elif (line := _line(error)) is not None:
            _fail(1, line)
        raise
    finally:
        in_charge = False


@contextlib.contextmanager
def hear(
    numbers: Collection[int],
    note: Callable[[int, FrameType | None], None],
    answer: Callable[[int], None],
) -> Iterator[None]:
    """While it is open, each of these signals calls `note` in the main thread, `answer` in another.

    Python calls `note` between two instructions of the main thread, which may be in the compiler
    for minutes; and what it raises, an import may swallow.
    """
    handlers = {number: signal.signal(number, note) for number in numbers}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        with open(reader, "rb", buffering=0) as arrived:  # a byte for each signal
            while number := int.from_bytes(arrived.read(1)):
                if number in numbers:
                    answer(number)

    Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)  # which ends the thread


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """In a command, SIGTERM ends the block as Ctrl-C does; it is then `Stopped`."""
    if not in_charge:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)  # which no library takes for an error of its own

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        if not error.args:
            raise
        raise Stopped("stopped by SIGTERM", signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def takes_ctrl_c() -> bool:
    """Whether this is a command that may decide what Ctrl-C does: not one in the background."""
    return in_charge and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def say(line: str) -> None:
    """Writes a line to stderr, from any thread, and progress bars below it."""
    with contextlib.suppress(OSError):
        tqdm.write(printable(line), file=sys.stderr)
        sys.stderr.flush()


def leave(number: int, line: str) -> NoReturn:
    """Ends a command and the processes that it started at once, from any thread, for a signal."""
    say(line)
    for child in multiprocessing.active_children():
        child.kill()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(128 + number)


def leave_terminal() -> None:
    """Sends what would be written to a terminal that is gone to nowhere, from any thread."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # isatty fails where it is gone
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _keep_compiled_programs() -> None:
    """Has JAX keep what it compiles in the user's cache folder, by JAX's own variables.

    Whoever sets JAX_COMPILATION_CACHE_DIR, to a folder or to nothing, decides. Machines that share
    a home have a folder each, for a program may hold instructions that another processor lacks. It
    is used on Linux alone, where the processor can be told.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    # A home that is not known or not writable, or no such file: programs are compiled each time.
    with contextlib.suppress(OSError, ConfigError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = ("model name", "flags", "Features")
        processor = {line for line in lines if line.startswith(names)}
        key = hashlib.sha256("\n".join(sorted(processor)).encode()).hexdigest()[:12]
        folder = cache_folder() / f"compiled-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
            os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(COMPILED_BYTES))


def cache_folder() -> Path:
    """This program's part of the user's cache folder; ConfigError if the home is not known."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base).expanduser() / "mrcnn_jax"
    except RuntimeError as error:
        raise ConfigError(f"XDG_CACHE_HOME: name a folder for what is kept: {error}") from None


def _open_streams() -> None:
    """Makes the standard streams such that writing to them raises nothing but OSError.

    Python has None for a closed one, and the next file to be opened would take its number.
    """
    closed = sys.stdout is None
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names need not fit the locale's encoding
            stream.reconfigure(errors="backslashreplace")
    if closed:
        _fail(2, f"standard output is closed (to discard it: > {os.devnull})")


def lost_output() -> OSError | None:
    """Why stdout or stderr cannot be written to any more; None if they can."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            poll = select.poll()
            poll.register(stream, select.POLLOUT)
            if any(events & select.POLLERR for _, events in poll.poll(0)):
                return BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        except io.UnsupportedOperation:  # no file: the stream is a test's
            pass
        except OSError as error:
            return error
    return None


def _line(error: OSError) -> str | None:
    """A file that cannot be read or written, in words; None for errors of connections and such."""
    name = error.filename2 or error.filename
    if error.errno is None or isinstance(error, ConnectionError | ChildProcessError):
        return None
    named = "standard output" if name is None else os.fsdecode(name)  # others have a name
    return f"{named}: {error.strerror}"


def _fail(status: int, line: str | None = None, start: str = "error: ") -> NoReturn:
    with contextlib.suppress(OSError):
        if line is not None:
            print(f"{start}{printable(line)}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Discard what is still buffered: the interpreter would complain when it flushes at
            # exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if leave_after is not None:
        time.sleep(leave_after)
        os._exit(status)
    sys.exit(status)


def explain_native_end(line: str) -> None:
    """From now on, if JAX ends this process because another one of the run died, prints `line`.

    JAX's threads then write pages of logs and a stack to stderr, and abort. They write to a process
    of ours instead, which passes on whatever else they write; Python's stderr stays as it is.
    """
    sys.stderr.flush()
    own = os.dup(2)
    code = "from mrcnn_jax.cli import pass_on; pass_on()"
    package = str(Path(__file__).parents[1])
    child = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {package!r}); {code}", line],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for this process
    )
    assert child.stdin is not None
    os.dup2(child.stdin.fileno(), 2)
    child.stdin.close()
    stream = os.fdopen(own, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    sys.stderr = PrintableStream(stream)  # type: ignore[assignment]


PEER_DIED = "JAX distributed service detected fatal errors"
_LOG = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ ([\w.]+):\d+\]")
_OF_PEERS = re.compile(r"coordination_service|preemption_sync_manager|client\.h")


def pass_on(source: TextIO | None = None) -> None:
    """Copies logs to stderr; those about a peer that died become the line in `sys.argv[1]`.

    Args:
        source: the logs; by default stdin.
    """
    held: list[str] = []  # of other processes: it is clear at the end whether one of them died
    about_peers = died = False
    for line in source or sys.stdin:
        if (found := _LOG.match(line)) is not None:
            about_peers = _OF_PEERS.search(found[1]) is not None
        died |= PEER_DIED in line
        if about_peers or died:
            held.append(line)
        else:
            sys.stderr.write(line)
            sys.stderr.flush()
    # A progress bar may stand on the line before.
    sys.stderr.write(f"\nerror: {sys.argv[1]}\n" if died else "".join(held))


def program() -> str:
    """The running program as it was typed: mrcnn, python -m mrcnn_jax, or python train.py."""
    spec, name = sys.modules["__main__"].__spec__, Path(sys.argv[0]).name
    if spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return f"python {name}" if name.endswith(".py") else name


def command_line() -> str:
    """The running command, to be typed again."""
    return f"{program()} {shlex.join(sys.argv[1:])}".rstrip()


def command(name: str, *words: object) -> str:
    """A subcommand with its arguments, to be typed where the running command was typed."""
    running = program()
    if name in SCRIPTS and running in {f"python {script}.py" for script in SCRIPTS}:
        start = f"python {name}.py"
    else:
        start = f"{running if running == 'mrcnn' else 'python -m mrcnn_jax'} {name}"
    return f"{start} {shlex.join(map(str, words))}".rstrip()
