"""Exit statuses and one-line errors, with streams that are closed, full or left by their reader."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mrcnn_jax import cli

ROOT = Path(__file__).parent.parent
BEGIN = """
import os, sys, time
from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
"""


def end(program: str, redirection: str = "", **environment: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of `cli.run` of a function with that body, run by a shell."""
    code = f"{BEGIN}def main():\n    {program}\ncli.run(main)"
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, code],
        capture_output=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print(1)", (0, "1\n", "")),
        ("print(1); sys.exit(2)", (2, "1\n", "")),
        ("raise ConfigError('a: b')", (2, "", "error: a: b\n")),
        ("raise cli.Failure('a: b')", (1, "", "error: a: b\n")),
        ("raise cli.Stopped('saved', 15)", (143, "saved\n", "")),
        ("raise cli.Stopped('saved', 2)", (130, "saved\n", "")),
        ("raise KeyboardInterrupt", (130, "", "interrupted\n")),
        (
            "with cli.sigterm_interrupts(): os.kill(os.getpid(), 15); time.sleep(9)",
            (143, "stopped by SIGTERM\n", ""),
        ),
        (
            "with cli.sigterm_interrupts(): raise KeyboardInterrupt",
            (130, "", "interrupted\n"),
        ),
        ("raise MemoryError", (1, "", "error: out of memory\n")),
        ("open('/dev')", (1, "", "error: /dev: Is a directory\n")),
        ("os.rename('/nowhere', '/b')", (1, "", "error: /b: No such file or directory\n")),
        ("open('a' * 300, 'w')", (1, "", f"error: {'a' * 300}: File name too long\n")),
    ],
)
def test_the_end_of_a_command(program: str, expected: tuple[int, str, str]) -> None:
    assert end(program) == expected


CLOSED = "error: standard output is closed (to discard it: > /dev/null)\n"
FULL = "error: standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("program", "redirection", "expected"),
    [
        ("open('done', 'w')", ">&-", (2, "", CLOSED)),  # before anything is done
        ("open('done', 'w')", ">&- 2>&-", (2, "", "")),
        ("print(1, file=sys.stderr); print(2)", "2>&-", (0, "2\n", "")),
        ("raise ConfigError('a: b')", "2>&-", (2, "", "")),
        ("print(os.open('/dev/null', 0) > 2)", "2>&- <&-", (0, "True\n", "")),
        ("print(1)", "> /dev/full", (1, "", FULL)),
        ("print(1); sys.exit(2)", "> /dev/full", (1, "", FULL)),
        ("print(1, flush=True)", "> /dev/full", (1, "", FULL)),
        ("raise cli.Stopped('saved', 15)", "> /dev/full", (1, "", FULL)),
        ("raise ConfigError('a: b')", "2> /dev/full", (2, "", "")),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_streams_that_take_nothing(
    program: str, redirection: str, expected: tuple[int, str, str], unbuffered: str
) -> None:
    assert end(program, redirection, PYTHONUNBUFFERED=unbuffered) == expected
    assert not (ROOT / "done").exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_left(stream: str) -> None:
    program = f"print(1, file=sys.{stream}, flush=True)"
    piped = "" if stream == "stdout" else "2>&1 >/dev/null"
    redirection = f"{piped} | true; echo ${{PIPESTATUS[0]}}"
    assert end(f"time.sleep(.3); {program}", redirection) == (0, "141\n", "")


def test_another_broken_pipe_is_no_reader_that_left() -> None:
    status, _, errors = end("raise BrokenPipeError('of a loader')")
    assert status == 1
    assert errors.endswith("BrokenPipeError: of a loader\n")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LC_ALL": "POSIX"}, "ü\\udcff\n"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "\\xfc\\udcff\n"),
        ({"PYTHONIOENCODING": "latin-1"}, None),
    ],
)
def test_names_that_the_locale_cannot_write(
    environment: dict[str, str], expected: str | None
) -> None:
    text = "'\\u00fc\\udcff'"
    if expected is not None:
        assert end(f"print({text})", **environment) == (0, expected, "")
        expected = f"error: {expected}"
        assert end(f"raise ConfigError({text})", **environment) == (2, "", expected)
    else:
        assert end("print('\\u4e2d')", **environment) == (0, "\\u4e2d\n", "")


# -- what JAX writes when another process died -----------------------------------------------------

LOG = "E1128 12:03:07.369932   10122 {}:1549] {}\n"
DIED = (
    "[Gloo] Rank 0 is connected\n"
    + LOG.format("coordination_service.cc", "Use error polling")
    + "1\nThe tasks have crashed.\n"
    + LOG.format("client.h", f"Terminating process because the {cli.PEER_DIED}.")
    + "*** Check failure stack trace: ***\n    @     0x7f1045040634  absl::SendToLog()\n"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (DIED, "[Gloo] Rank 0 is connected\n\nerror: the line\n"),
        (f"{cli.PEER_DIED}\n", "\nerror: the line\n"),
        (LOG.format("cuda.cc", "out of memory") + "more\n", None),
        (LOG.format("coordination_service.cc", "a warning") + "more\n", None),
        ("", None),
    ],
)
def test_logs_about_a_peer_become_one_line(
    text: str,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Everything else is passed on."""
    monkeypatch.setattr(sys, "argv", ["-c", "the line"])
    cli.pass_on(io.StringIO(text))
    assert capsys.readouterr().err == (text if expected is None else expected)


COMPILE = """import jax; jax.jit(lambda x: x + 1)(0)
    print(jax.config.jax_compilation_cache_max_size)"""
ALWAYS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}


def test_compiled_programs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's cache folder, of a bounded size; in the user's own choice, without, or nowhere;
    a home that nothing can be written to is no error."""
    own, home, file = tmp_path / "own", tmp_path / "home", tmp_path / "file"
    file.touch()
    assert end(COMPILE, JAX_COMPILATION_CACHE_DIR=str(own), **ALWAYS) == (0, "-1\n", "")
    assert list(own.iterdir())
    assert end(COMPILE, JAX_COMPILATION_CACHE_DIR="", HOME=str(home), **ALWAYS)[1:] == ("-1\n", "")
    assert not home.exists()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert end(COMPILE, HOME=str(home), **ALWAYS) == (0, f"{2 << 30}\n", "")
    (folder,) = (home / ".cache" / "mrcnn_jax").iterdir()
    assert any(entry.name.startswith("jit_") for entry in folder.iterdir())
    assert end(COMPILE, XDG_CACHE_HOME=str(file), **ALWAYS) == (0, "-1\n", "")
