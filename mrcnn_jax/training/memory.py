"""Memory: of a train step, of the devices, and the largest batch that fits in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Batch

GIB = 2**30


def program_bytes(program: jax.stages.Compiled) -> int:
    """Bytes that a compiled program holds on a device: arguments, results and temporaries."""
    sizes = program.memory_analysis()
    assert sizes is not None  # CPU and GPU compilers know
    own_results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + own_results + sizes.temp_size_in_bytes


def device_memory() -> int | None:
    """Bytes that a training may take on each device of this process.

    Of a GPU, what JAX takes for itself, three quarters by default; of a CPU, an even part of what
    the host has available. None: not known.
    """
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
        return min((limit for limit in limits if limit is not None), default=None)
    available = host_memory()
    return None if available is None else available // len(devices)


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that programs of this process can still have; None: not known (no Linux).

    Args:
        root: where proc/ and sys/ are.

    Returns:
        The least of what the host has available and what each control group of the process
        (containers are such) leaves, where pages of files that are not in use count as free.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    if found is None:
        return None
    return max(0, min([1024 * int(found[1]), *_left_by_groups(root)]))


def _left_by_groups(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # Limits of groups further up hold as well. Inside a container only its own may be there.
        folder = base / group.lstrip("/")
        for each in (folder, *(above for above in folder.parents if above.is_relative_to(base))):
            with suppress(ValueError):  # "max", or no such file
                left = int(_text(each / names[0])) - int(_text(each / names[1]))
                unused = re.search(
                    rf"^{names[2]} (\d+)$", _text(each / "memory.stat"), re.MULTILINE
                )
                yield left + (0 if unused is None else int(unused[1]))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def out_of_memory(
    error: Exception,
    train_step: Any,
    state: TrainState,
    batch: Batch,
    *,
    limit: int | None = None,
    multiple: int = 1,
) -> str | None:
    """Names the largest batch that fits, if `error` says that the memory of the device ran out.

    The step is compiled for its smallest batch and for about half of this one; its need is taken to
    lie on the line through both.

    Args:
        train_step: the jitted step that failed.
        state, batch: its arguments, or arrays of their shapes: values are not read, since they may
            have been donated.
        limit: bytes of a device; None: as the device reports.
        multiple: a batch must be a multiple of it: the number of devices that share the batch.

    Returns:
        One line; None for any other error.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    if limit is None:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    size = len(batch.valid)
    half = max(size // (2 * multiple), 2) * multiple
    small, large = (_need(train_step, state, batch, images) for images in (multiple, half))

    def need(images: int) -> float:
        return small + (large - small) * (images - multiple) / (half - multiple)

    line = f"out of device memory: a step of batch {size} needs about {need(size) / GIB:.2f} GiB"
    if limit is None:
        return f"{line} (--data.batch-size, --model.remat, --data.canvases make it less)"
    line += f", the device has {limit / GIB:.2f}"
    if need(size) <= limit:
        return (
            f"{line}: something else holds a part of it (nvidia-smi lists programs; "
            "XLA_PYTHON_CLIENT_MEM_FRACTION is the share that JAX takes)"
        )
    smaller = range(multiple, size, multiple)
    fits = max((images for images in smaller if need(images) <= limit), default=None)
    if fits is None:
        return (
            f"{line}: no batch fits, {multiple} needs about {small / GIB:.2f} GiB "
            "(--model.remat, --data.canvases make it less)"
        )
    return (
        f"{line}: batch {fits} fits (--data.batch-size {fits}, with another --workdir; "
        "--model.remat makes more fit)"
    )


def _need(train_step: Any, state: TrainState, batch: Batch, images: int) -> int:
    """Bytes of the step for a batch of `images`."""

    def shape(leaf: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, leaf.dtype, sharding=getattr(leaf, "sharding", None))

    state = jax.tree.map(lambda leaf: shape(leaf, *leaf.shape), state)
    batch = jax.tree.map(lambda leaf: shape(leaf, images, *leaf.shape[1:]), batch)
    return program_bytes(train_step.lower(state, batch).compile())
