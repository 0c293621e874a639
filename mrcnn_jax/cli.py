"""Exit statuses and one-line errors of the commands, and the names under which they are called."""

from __future__ import annotations

import os
import select
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import printable

SCRIPTS = ("train", "eval", "predict")  # also files of a checkout: python train.py


class Failure(RuntimeError):
    """The work failed for a reason that one line explains: exit status 1."""


class Stopped(Exception):
    """The work was stopped from outside, and its state is saved: exit status 0."""


def run(main: Callable[[], object]) -> None:
    """Calls `main` and exits as its end requires.

    A ConfigError becomes one line on stderr and exit status 2, a `Failure` status 1, `Stopped` a
    line on stdout, Ctrl-C status 130, and a reader that has left (`| head`) status 141.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        main()
        sys.stdout.flush()
    except Stopped as stopped:
        print(printable(str(stopped)))
    except (ConfigError, Failure) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except BrokenPipeError:
        if not _reader_left():  # another pipe broke, such as that of a loader's process
            raise
        # Discard what is still buffered: the interpreter would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)


def _reader_left() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


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
