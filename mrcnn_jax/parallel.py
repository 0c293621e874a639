"""Many devices, of one process or of several: a mesh with one axis, along which the rows of a batch
lie.

A step is written for the whole batch. Its rows are spread over the devices, parameters are on each
of them (or spread too, and put together for a step), and XLA's partitioner adds up losses,
gradients and batch statistics: they are those of the whole batch by construction. Where there is
one device, there is no mesh, and programs are compiled as if this file did not exist.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrcnn_jax.config.schema import ConfigError, DistributedConfig

AXIS = "data"
_SHUTDOWN_SECONDS = (
    60  # that a process which ends waits for the others: one that failed must not keep them long
)

Result = TypeVar("Result")


# -- processes -------------------------------------------------------------------------------------


def join(config: DistributedConfig) -> None:
    """Makes this process one of several, which print through the first one; nothing may have asked
    for a device before.

    Returns when all of them are there. ConfigError if they cannot be found.
    """
    if config.coordinator is None:
        return
    found: dict[str, Any] = {
        "coordinator_address": config.coordinator,
        "num_processes": config.processes,
        "process_id": config.index,
    }
    try:
        jax.distributed.initialize(
            **({} if config.coordinator == "auto" else found),
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"distributed.coordinator: {config.coordinator}: {str(error).splitlines()[0]}"
        ) from None
    if not is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_first() -> bool:
    """Whether this process writes files and draws bars: one of them does."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """`value` of every process, in their order, on all of them: each has to call this."""
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(content)] = content
    return [
        pickle.loads(row[:size].tobytes())
        for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)
    ]


def in_turn(function: Callable[[], Result]) -> Result:
    """`function()` of the first process, then of the others at once, which find the files that it
    made.

    A ConfigError of the first process is one of all.
    """
    results: list[Result] = []
    error = None
    if is_first():
        try:
            results.append(function())
        except ConfigError as refused:
            error = refused
    error = gather(error)[0]
    if error is not None:
        raise error
    return results[0] if results else function()


def of_first(tree: Any) -> Any:
    """The arrays of the first process, on all of them."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def refuse_differing(values: dict[str, Any]) -> None:
    """ConfigError that names the first of `values` in which the processes differ."""
    by_process = gather(values)
    for name in values:
        found = [there[name] for there in by_process]
        if any(value != found[0] for value in found):
            raise ConfigError(
                f"{name}: differs between the processes: {', '.join(map(str, found))}"
            )


# -- devices ---------------------------------------------------------------------------------------


def data_mesh() -> Mesh | None:
    """All devices along one axis, those of a process together; None if there is but one."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    counts = Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"distributed: the processes have different numbers of devices: {', '.join(map(str, counts.values()))}"
        )
    return Mesh(np.array(devices), (AXIS,)) if len(devices) > 1 else None


def refuse_uneven(batch_size: int, mesh: Mesh | None) -> None:
    """ConfigError if the devices cannot have equally many rows of a batch."""
    if mesh is None or batch_size % mesh.size == 0:
        return
    below = batch_size // mesh.size * mesh.size
    nearest = f"{below} and {below + mesh.size} do" if below else f"{mesh.size} does"
    raise ConfigError(
        f"data.batch_size: {batch_size} images do not divide by {mesh.size} devices ({nearest})"
    )


def per_image(function: Callable[..., Result], mesh: Mesh | None) -> Callable[..., Result]:
    """Lifts a function of one image to the rows of a batch, each computed on its own device.

    XLA's partitioner does not know that rows are independent in `top_k`: without `shard_map`, every
    device would search the whole batch.
    """
    lifted = jax.vmap(function)
    if mesh is None:
        return lifted
    rows = PartitionSpec(AXIS)
    return jax.shard_map(lifted, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)


# -- where arrays lie ------------------------------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Spread along the first axis."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def spread(leaf: Any, mesh: Mesh) -> NamedSharding:
    """Spread along the longest axis that divides by the number of devices; without such an axis, a
    copy on every device."""
    axes = [axis for axis, side in enumerate(leaf.shape) if side > 0 and side % mesh.size == 0]
    if not axes:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, AXIS))


def place(tree: Any, layout: Any) -> Any:
    """Device arrays, in memory of their own, of host arrays that every process has; `layout`: a
    sharding a leaf."""

    def leaf(host: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(host)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(jax.numpy.array, jax.tree.map(leaf, tree, layout))


def bytes_a_device(tree: Any) -> int:
    """What the arrays take on the first of this process's devices."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """A batch on the devices, from the rows that this process has; without a mesh, as it is."""
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(by_rows(mesh), leaf), tree
    )


def to_host(tree: Any) -> Any:
    """NumPy arrays, whole ones on every process: each has to call this."""

    def leaf(array: Any) -> np.ndarray:
        whole = (
            not isinstance(array, jax.Array)
            or array.is_fully_addressable
            or array.is_fully_replicated
        )
        return np.asarray(array) if whole else multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(leaf, tree)


def rows_to_host(tree: Any, mesh: Mesh | None) -> Any:
    """NumPy arrays of the rows that this process has."""
    if mesh is not None:
        tree = multihost_utils.global_array_to_host_local_array(tree, mesh, PartitionSpec(AXIS))
    return jax.device_get(tree)
