"""A device's memory that runs out while images are predicted."""

from __future__ import annotations

import pytest

from mrcnn_jax import cli
from mrcnn_jax.inference.out_of_memory import explaining_out_of_memory


@pytest.mark.parametrize(
    ("size", "option", "line"),
    [
        (8, "--eval-batch-size", r"^out of .* with 8 images at once \(--eval-batch-size 4 needs "),
        (3, "--data.eval-batch-size", r"^out of .* with 3 images .* \(--data.eval-batch-size 1 "),
        (1, "--eval-batch-size", "^out of device memory with 1 image at once$"),
    ],
)
def test_a_smaller_batch_is_named(size: int, option: str, line: str) -> None:
    with pytest.raises(cli.Failure, match=line), explaining_out_of_memory(size, option):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="something else"), explaining_out_of_memory(8):
        raise RuntimeError("something else")
