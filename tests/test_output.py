"""Files that are whole or absent, and aligned tables."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from mrcnn_jax.output import printable, printable_streams, printable_values, text_table, whole_file


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
    with printable_streams():
        print("out", HOSTILE)
        print(HOSTILE, file=sys.stderr)
        logging.getLogger("a logger without handlers of its own").warning("%s", HOSTILE)
        tqdm.write(HOSTILE)
        with tqdm(total=3, desc=HOSTILE, disable=False, ascii=True) as bar:
            bar.update()
    print("\x1b[1mas before")
    out, err = capsys.readouterr()
    assert out == f"out {ESCAPED}\n{ESCAPED}\n\x1b[1mas before\n"
    assert err.startswith(f"{ESCAPED}\n")
    assert err.count(ESCAPED) >= 2
    assert not set(err) & {"\x1b", "\x07", "\u202e", "\x9b"}
    assert f"\r{ESCAPED}: " in err  # a bar still goes back to the start of its line
