"""Values of many bits as 8, by hand; test_decode.py has files of all kinds."""

from __future__ import annotations

import numpy as np
import pytest

from mrcnn_jax.pixels.samples import Samples, bits_of, eight_bits


@pytest.mark.parametrize(
    ("largest", "bits"),
    [(0, 8), (255, 8), (256, 10), (1023, 10), (1024, 12), (4096, 14), (16384, 16), (70000, 16)],
)
def test_the_largest_value_has_so_many_bits(largest: int, bits: int) -> None:
    assert bits_of(np.array([[3, largest]])) == bits


@pytest.mark.parametrize(
    ("samples", "expected", "told"),
    [
        (Samples(bits=16), [0, 6, 255], "16-bit with values of 12 bits (scaled by 1/16)"),
        (Samples(bits=16, least_bits=14), [0, 1, 63], "16-bit with values of 14 bits (scaled"),
        (Samples(bits=16, white_is_zero=True), [255, 249, 0], "16-bit with values of 12 bits"),
        (Samples(bits=12), [0, 6, 255], "12-bit (scaled by 1/16)"),
        (Samples(bits=16, nodata=4095), [15, 100, 0], "16-bit with values of 8 bits (as they are)"),
        (Samples(bits=16, white_is_zero=True, nodata=4095), [240, 155, 0], "16-bit with values of"),
        (Samples(bits=16, nodata=4094), [0, 6, 255], "16-bit with values of 12 bits (scaled by"),
    ],
)
def test_scaled_values(samples: Samples, expected: list[int], told: str) -> None:
    values, how = eight_bits(np.array([[15, 100, 4095]], np.uint16), samples)
    assert values.dtype == np.uint8
    assert values.tolist() == [expected]
    assert how.startswith(told)


def test_colours_are_no_value_only_together() -> None:
    values = np.array([[[65535, 9, 9], [65535] * 3]], np.uint16)
    assert bits_of(values, 65535) == 16
    assert bits_of(values[:, 1:], 65535) == 8
    scaled, _ = eight_bits(values, Samples(bits=16, nodata=65535))
    assert scaled.tolist() == [[[255, 0, 0], [0, 0, 0]]]
    scaled, _ = eight_bits(np.array([[-9999, 7]]), Samples(bits=16, signed=True, nodata=-9999))
    assert scaled.tolist() == [[0, 7]]


@pytest.mark.parametrize("value", [-1, 65536])
def test_other_values_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="negative or have more than 16 bits"):
        eight_bits(np.array([[5, value]]), Samples(bits=32))
