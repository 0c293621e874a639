"""Values of JSON files that exporters and people wrote: read leniently, quoted briefly."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mrcnn_jax.config.errors import ConfigError, refuse_pipe


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def read_bytes(path: Path) -> bytes:
    """The file's bytes; ConfigError with its name if it cannot be read."""
    refuse_pipe(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _refuse_repeated(key: str) -> None:
    raise ConfigError(f"the key {short(key)} is there twice in one object")


def read_json(
    path: Path,
    constant: Callable[[str], float] = _refused,
    repeated: Callable[[str], object] = _refuse_repeated,
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        constant: called with NaN, Infinity or -Infinity, which Python writes but JSON does not
            have; its result takes their place. By default they are refused.
        repeated: called with each key that an object has again, whose last value is used. By
            default they are refused.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or holds another value than an object.
    """
    return parse_json(read_bytes(path), path, constant, repeated)


def parse_json(
    encoded: bytes,
    path: Path,
    constant: Callable[[str], float] = _refused,
    repeated: Callable[[str], object] = _refuse_repeated,
) -> dict[str, Any]:
    """The JSON object in the bytes of a file, as of `read_json`; `path` is for messages."""
    content = _parsed(encoded, path, constant, repeated)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, not a {type(content).__name__}")
    return content


def read_json_list(path: Path) -> list[Any]:
    """The JSON list in a file; ConfigError as of `read_json`, keys that are repeated included."""
    content = _parsed(read_bytes(path), path, _refused, _refuse_repeated)
    if not isinstance(content, list):
        raise ConfigError(f"{path}: expected a JSON list, not a {type(content).__name__}")
    return content


def _parsed(
    encoded: bytes,
    path: Path,
    constant: Callable[[str], float],
    repeated: Callable[[str], object],
) -> Any:
    def built(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        item = dict(pairs)
        if len(item) < len(pairs):
            for key, times in Counter(key for key, _ in pairs).items():
                for _ in range(times - 1):
                    repeated(key)
        return item

    try:
        return json.loads(encoded, parse_constant=constant, object_pairs_hook=built)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # also of json and of the UTF-8 decoder
        raise ConfigError(f"{path}: not JSON (empty or cut off?): {error}") from None


def integer(value: Any) -> int | None:
    """12 for 12, 12.0 and "12"; None for anything that is not a 64-bit integer."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,19}\s*", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**63 else None


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that float32 arithmetic can stand (NaN is not)."""
    return type(value) in (int, float) and abs(value) <= 1e9


def is_text(value: Any) -> bool:
    """Whether a value is a name for a line of UTF-8: no control characters, no lone surrogates."""
    return (
        isinstance(value, str)
        and value != ""
        and not any(unicodedata.category(c) in ("Cc", "Cs") for c in value)
    )


def has_constant(value: Any) -> bool:
    """Whether a value is or contains NaN or an infinity."""
    left = [value]  # our own stack: the nesting may be as deep as the parser allows
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, float) and not math.isfinite(value):
            return True
    return False


def short(value: Any) -> str:
    """`value` in at most 43 printable characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
