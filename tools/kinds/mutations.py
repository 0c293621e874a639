"""Random damage to bytes and to values of JSON, a pure function of its generator."""

from __future__ import annotations

import copy
import struct
import zlib
from typing import Any

import numpy as np

HEIGHT, WIDTH = 48, 64  # of every image


class WrongError(Exception):
    """A damaged input changed what is read, and nothing tells."""


def one_line(error: Exception) -> str:
    """The outcome of an input that is refused; ValueError if the reason takes several lines."""
    if "\n" in str(error):
        raise ValueError(f"not one line: {error}")
    return "refused"


def nasty(rng: np.random.Generator) -> Any:
    """A value that code may stumble over."""
    far = float(10.0 ** rng.uniform(2, 12))
    garbage = "".join(map(chr, rng.integers(48, 112, rng.integers(1, 40)).tolist()))
    deep: list[Any] = []
    for _ in range(50):
        deep = [deep]
    # fmt: off
    values: tuple[Any, ...] = (
        None, True, False, "", "12", " 7 ", 12.0, 7.5, -1, 0, 1, 2**31, 2**32 + 7, 2**63, 10**400,
        1e308, 1e-300, float("nan"), float("inf"), -float("inf"), [], {}, [[]], [None], "\ud800",
        "\0", "x" * 5000, "../a.png", "/a.png", "..\\a.png", deep, [far] * 6,
        [[far, 0, far, far, 0, far]], [[-far, -far, far, far, far, -far]], [0.2, 0.3, 0.1, 0.4],
        [far] * 4, [[0, 0, WIDTH, HEIGHT] * 500], [[1, 1, 9, 1, 9, 9]] * 300, [[5, 5]] * 8,
        list(range(8)), [1, 2, 3, 4], int(far), -far,
        {"size": [HEIGHT, WIDTH], "counts": garbage},
        {"size": [HEIGHT, WIDTH], "counts": f"b'{garbage}'"},
        {"size": [HEIGHT, WIDTH], "counts": rng.integers(-2, 2000, 9).tolist()},
        {"size": [HEIGHT, WIDTH], "counts": [0] * 1000 + [HEIGHT * WIDTH]},
        {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
        {"size": [2**31, 2**31], "counts": garbage},
    )
    # fmt: on
    return values[rng.integers(len(values))]


def mutate_value(rng: np.random.Generator, content: dict[str, Any]) -> None:
    """Replaces, removes, doubles, moves or changes one value anywhere in the file."""
    slots: list[tuple[Any, Any]] = []  # (container, key)
    left: list[Any] = [content]
    while left:
        node = left.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        slots += [(node, key) for key in keys]
        left += [node[key] for key in keys if isinstance(node[key], dict | list)]
    if not slots:
        return
    node, key = slots[rng.integers(len(slots))]
    other, place = slots[rng.integers(len(slots))]
    value = node[key]
    match rng.integers(7):
        case 0:
            del node[key]
        case 1 if isinstance(node, list):
            node.insert(key, copy.deepcopy(value))
        case 2:
            other[place] = copy.deepcopy(value)
        case 3 if type(value) in (int, float) and abs(value) < 1e300:
            changes = (-value, value + 0.5, str(value), float(value), value * 1000, value / 64)
            node[key] = changes[rng.integers(len(changes))]
        case 4:
            node[key] = [value]
        case _:
            node[key] = nasty(rng)


def mutated_bytes(rng: np.random.Generator, encoded: bytes) -> bytes:
    """One to four changes, more of them near the start, where headers are."""
    data = bytearray(encoded)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        at = int(len(data) * rng.random() ** rng.integers(1, 5))
        span = int(rng.integers(1, 40))
        match rng.integers(8):
            case 0 | 1:
                data[at] ^= 1 << rng.integers(8)
            case 2:
                data[at] = rng.integers(256)
            case 3:
                del data[at : at + span]
            case 4:
                data[at:at] = rng.bytes(span)
            case 5:
                data[at:at] = data[at : at + span]
            case 6:
                extreme = (0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)[rng.integers(6)]
                data[at : at + 4] = struct.pack(">I", extreme)
            case 7 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


def with_checksums(encoded: bytes) -> bytes:
    """A PNG with the right checksum for each chunk whose length still fits; other files as is."""
    data, at = bytearray(encoded), 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)
