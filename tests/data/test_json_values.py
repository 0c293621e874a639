"""Values of JSON files as exporters write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.json_values import integer, is_number, is_text, read_json, read_json_list, short


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (12, 12),
        (12.0, 12),
        ("12", 12),
        (" -7 ", -7),
        (2**63 - 1, 2**63 - 1),
        *((value, None) for value in (2**63, 12.5, "12.0", "", "x", None, True, [1], float("nan"))),
    ],
)
def test_integers(value: Any, expected: int | None) -> None:
    assert integer(value) == expected


def test_numbers_are_finite_and_of_a_size_for_float32() -> None:
    assert all(map(is_number, (0, -1.5, 1e9, -(10**9))))
    assert not any(map(is_number, (True, "1", None, float("nan"), float("inf"), 1.1e9, 10**400)))


def test_text_fits_a_line_of_utf_8() -> None:
    assert all(map(is_text, ("a", "ядро", " 🌳 ", "narrow\u202fspace")))
    assert not any(map(is_text, ("", "a\nb", "a\0b", "\ud800", 7, None)))


def test_a_long_value_is_quoted_in_part() -> None:
    assert short("a\n") == "'a\\n'"
    assert short("x" * 100) == "'" + "x" * 39 + "..."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "x.json: No such file or directory"),
        (b"", "x.json: not JSON \\(empty or cut off\\?\\): "),
        (b"[" * 100_000, "x.json: not JSON "),
        (b"\xff\xfe\x00", "x.json: not JSON "),
        (b'{"a": NaN}', "x.json: not JSON .*NaN is not JSON"),
        (b'{"a": [{"b": 1, "b": 2}]}', "x.json: the key 'b' is there twice in one object"),
        (b"[{}]", "x.json: expected a JSON object, not a list"),
    ],
)
def test_a_file_without_a_json_object_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(raised.value)


def test_constants_are_given_to_the_caller(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": NaN, "b": -Infinity}')
    assert read_json(tmp_path / "x.json", str) == {"a": "NaN", "b": "-Infinity"}


def test_keys_that_are_there_again_are_given_to_the_caller(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1, "b": {"a": 1, "a": 2, "a": 3}, "c": {"a": 1}}')
    keys: list[str] = []
    content = read_json(tmp_path / "x.json", repeated=keys.append)
    assert content == {"a": 1, "b": {"a": 3}, "c": {"a": 1}}
    assert keys == ["a", "a"]


def test_a_list(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}, 2]')
    assert read_json_list(path) == [{"a": 1}, 2]
    with pytest.raises(ConfigError, match=r"x.json: expected a JSON object, not a list$"):
        read_json(path)
    for text, message in (
        ('{"a": 1}', "expected a JSON list, not a dict"),
        ('[{"a": 1, "a": 2}]', "the key 'a' is there twice"),
        ("[NaN]", "not JSON .*NaN"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"x.json: {message}"):
            read_json_list(path)
