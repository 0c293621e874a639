"""A device whose memory runs out while images are predicted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mrcnn_jax import cli


@contextmanager
def explaining_out_of_memory(size: int, option: str = "--eval-batch-size") -> Iterator[None]:
    """Raises Failure, which names a smaller batch, if the device's memory runs out.

    Args:
        size: images at once on a device.
        option: of the command, that sets it.
    """
    try:
        yield
    except RuntimeError as error:  # of JAX, which is not imported for this
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fewer = f" ({option} {size // 2} needs less)" if size > 1 else ""
        images = "1 image" if size == 1 else f"{size} images"
        raise cli.Failure(f"out of device memory with {images} at once{fewer}") from error
