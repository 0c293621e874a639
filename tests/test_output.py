"""Files that are whole or absent, and aligned tables."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from mrcnn_jax.output import (
    listed,
    printable,
    printable_streams,
    printable_values,
    progress_bar,
    remove_abandoned,
    text_table,
    whole_file,
    write_file,
)

ROOT = Path(__file__).parent.parent


def test_a_file_is_replaced_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("old", "new"):
        with whole_file(path) as part:
            part.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fill() -> None:
        with whole_file(path) as part:
            part.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        fill()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_columns_are_aligned() -> None:
    rows = [("", "name", "count"), ("a", "long one", "3"), ("bb", "x", "12,345")]
    assert text_table(rows, left=2) == [
        "    name       count",
        "a   long one       3",
        "bb  x         12,345",
    ]
    assert text_table([("a", "b"), ("cc", "")], left=2) == ["a   b", "cc"]


def test_of_many_names_the_first_are_listed_and_the_others_counted() -> None:
    assert listed("ab") == "a, b"
    assert listed("abc") == "a, b, c"
    assert listed("abcdefg") == "a, b, c and 4 more"
    assert listed(dict.fromkeys("abc"), 2, separator="; ") == "a; b and 1 more"


HOSTILE = "a\x1b]0;title\x07\x1b[2J b\u202egnp.exe\u2066\x9b31m\r\x7f\udce4"
ESCAPED = r"a\x1b]0;title\x07\x1b[2J b\u202egnp.exe\u2066\x9b31m\r\x7f\udce4"


def test_control_characters_are_escaped() -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable("a\tb\n", one_line=True) == r"a\tb\n"
    assert printable_values({HOSTILE: [HOSTILE, (1, None)]}) == {ESCAPED: [ESCAPED, [1, None]]}


@pytest.mark.parametrize(
    "text", ["Bäume\t樹木\n", "ذئب", "זאב", "\U0001f468\u200d\U0001f469 न\u200dी", "a\\b"]
)
def test_what_people_write_stays_as_it_is(text: str) -> None:
    """Letters of all scripts, and joiners, which Hindi and emoji need."""
    assert printable(text) == text


def test_nothing_that_is_printed_or_logged_controls_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Without the lone surrogate: pytest keeps what is logged, and could not hand it on.
    hostile, escaped = HOSTILE[:-1], ESCAPED.removesuffix(r"\udce4")
    with printable_streams():
        print("out", hostile)
        print(hostile, file=sys.stderr)
        logging.getLogger("a logger without handlers of its own").warning("%s", hostile)
        tqdm.write(hostile)
        with tqdm(total=3, desc=hostile, disable=False, ascii=True) as bar:
            bar.update()
    print("\x1b[1mas before")
    out, err = capsys.readouterr()
    assert out == f"out {escaped}\n{escaped}\n\x1b[1mas before\n"
    assert err.startswith(f"{escaped}\n")
    assert err.count(escaped) >= 2
    assert not set(err) & {"\x1b", "\x07", "\u202e", "\x9b"}
    assert f"\r{escaped}: " in err  # a bar still goes back to the start of its line


def test_a_bar_in_a_log_file_is_not_drawn_at_every_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar(100, "evaluating") as bar:
        assert bar.mininterval == bar.maxinterval == 30
        for _ in range(100):
            bar.update()
            time.sleep(0.01)
    assert capsys.readouterr().err.count("evaluating: ") <= 2  # at its beginning and end


def test_a_name_that_just_fits_is_written(tmp_path: Path) -> None:
    """The hidden name beside it has to fit, too, and be one that a file can have."""
    for name in ("a" * 255, "ü" * 127):
        write_file(tmp_path / name, "text")
        assert (tmp_path / name).read_bytes() == b"text"
    with pytest.raises(OSError, match="name too long"):
        write_file(tmp_path / ("a" * 256), "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a" * 255, "ü" * 127]


def test_an_error_names_the_final_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for name in (None, str(tmp_path / ".a.01234567.part" / "b")):
        with pytest.raises(OSError, match="No space left") as error, whole_file(path):
            raise OSError(28, "full", name)
        assert (error.value.errno, error.value.filename) == (28, str(path))
    with pytest.raises(OSError, match="missing") as error, whole_file(path):
        raise OSError(2, "missing", "another")
    assert error.value.filename == "another"


KILLED = """if True:
    import os, sys
    from pathlib import Path
    from mrcnn_jax.output import part_folder, whole_file
    folder = Path(sys.argv[1])
    with whole_file(folder / "a.json") as part, part_folder(folder / "run") as run:
        part.write_text("half")
        (run / "half").write_text("half")
        print("written", flush=True)
        sys.stdin.read()
"""


def test_what_the_dead_left_is_removed_and_what_the_living_write_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    dead, alive = (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        for _ in range(2)
    )
    for process in (dead, alive):
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
    of_others = {tmp_path / ".a.01234567.part~", tmp_path / "b.part", tmp_path / ".a.part"}
    for path in of_others:
        path.touch()
    assert len(list(tmp_path.iterdir())) == 4 + len(of_others)
    dead.kill()
    dead.wait()
    remove_abandoned(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 + len(of_others)
    with whole_file(tmp_path / "a.json") as part:
        part.write_text("whole")
    alive.communicate()
    assert alive.returncode == 0
    assert set(tmp_path.iterdir()) == {tmp_path / "a.json"} | of_others
    assert (tmp_path / "a.json").read_text() == "half"  # that of the last one
    remove_abandoned(tmp_path / "nowhere")
