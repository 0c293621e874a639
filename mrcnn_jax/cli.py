"""What the scripts share: one line and exit status 2 for a user's mistake."""

from __future__ import annotations

import os
import select
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from mrcnn_jax.config.errors import ConfigError


def run(main: Callable[[], None]) -> None:
    """Calls `main`; a ConfigError becomes one line on stderr and exit status 2, Ctrl-C status 130,
    a reader that left (`| head`) 141."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        main()
        sys.stdout.flush()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        if not _reader_left():  # another pipe broke, as that of a loader's process
            raise
        # What the buffer still holds goes nowhere: the interpreter would complain when it flushes
        # it at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)


def _reader_left() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def program() -> str:
    """How the running command was called, for its help: python train.py, mrcnn-train or python -m
    mrcnn_jax.commands.check."""
    module, name = sys.modules["__main__"].__spec__, Path(sys.argv[0]).name
    if module is not None:
        return f"python -m {module.name}"
    return f"python {name}" if name.endswith(".py") else name


def command_line() -> str:
    """The running command, to be typed again."""
    return f"{program()} {shlex.join(sys.argv[1:])}".rstrip()
