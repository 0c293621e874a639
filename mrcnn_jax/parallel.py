"""Data parallelism over the devices of one or several processes: a mesh with a single axis.

A step is written for the whole batch. The rows of the batch are spread over the devices; parameters
are copied to each device (or spread too, and gathered for a step). XLA's partitioner sums losses,
gradients and batch statistics, so they are those of the whole batch by construction. With one
device there is no mesh, and programs are compiled as if this file did not exist.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from types import TracebackType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DistributedConfig

AXIS = "data"
# A process that has not been heard of for so long is dead, and the others end.
_HEARTBEAT_SECONDS = 20
# How long a process that has done its part waits for the others, which may still evaluate or draw;
# one that failed waits for nobody.
_SHUTDOWN_SECONDS = 3600
_PEER_DIED = re.compile(r"Gloo|NCCL|coordination service|heartbeat|Connection (closed|reset)", re.I)

Result = TypeVar("Result")


# -- processes -------------------------------------------------------------------------------------


def join(config: DistributedConfig) -> None:
    """Makes this process one of several, and waits until all have joined; only the first prints.

    Call before anything touches a JAX device.

    Raises:
        ConfigError: the processes do not find each other.
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
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"distributed.coordinator: {config.coordinator}: {str(error).splitlines()[0]}"
        ) from None
    # What all processes refuse, the others say while the first one is still there: they need it.
    cli.leave_after = 2.0 if is_first() else 0.0
    cli.explain_native_end("another process of this run has died: see its own last lines")
    sys.excepthook = _leave
    if not is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends this process at once after an error, for the others wait for it."""
    if isinstance(error, RuntimeError | ValueError) and _PEER_DIED.search(str(error)):
        os.write(2, f"{cli.PEER_DIED}\n".encode())  # as JAX would say a little later
    else:
        sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    os._exit(1)


def is_first() -> bool:
    """Returns whether this is the one process that writes files and draws progress bars."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Returns the `value` of every process, in their order, to all of them. All must call it.

    Nothing that another process sends is run (no pickles): JAX's coordinator lets in whoever
    reaches its port.

    Args:
        value: lists, tuples (lists on arrival), dicts with text keys, text, numbers, None, and
            NumPy arrays of numbers or truth values. All of them arrive as they are, to the bit.

    Raises:
        ConfigError: a process sent something else.
    """
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(_packed(value), np.uint8)
    parts = multihost_utils.process_allgather(np.array(divmod(len(content), _AT_ONCE), np.int32))
    sizes = [int(whole) * _AT_ONCE + int(rest) for whole, rest in parts]
    received = [bytearray() for _ in sizes]
    for start in range(0, max(sizes), _AT_ONCE):
        padded = np.zeros(min(_AT_ONCE, max(sizes) - start), np.uint8)
        piece = content[start : start + len(padded)]
        padded[: len(piece)] = piece
        for whole, row in zip(received, multihost_utils.process_allgather(padded), strict=True):
            whole += row.tobytes()
    try:
        return [_unpacked(bytes(row[:size])) for row, size in zip(received, sizes, strict=True)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"distributed: a process sent what is no message: {error}") from None


_AT_ONCE = 2**30  # bytes of a process that `gather` sends: sizes have to fit into 32 bits
_ARRAY = "array"  # the only key of what stands for an array in the JSON text


def _packed(value: Any) -> bytes:
    """JSON of the value on one line, then the bytes of its arrays."""
    arrays: list[bytes] = []

    def described(array: Any) -> dict[str, Any]:
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise TypeError(f"{type(array).__name__} cannot be sent to other processes")
        arrays.append(array.tobytes())
        return {_ARRAY: [array.dtype.str, array.shape]}

    return b"".join([json.dumps(value, default=described).encode(), b"\n", *arrays])


def _unpacked(content: bytes) -> Any:
    """Inverse of `_packed`; ValueError, TypeError or KeyError for any other bytes."""
    text, _, data = content.partition(b"\n")
    start = 0

    def restored(found: dict[str, Any]) -> Any:
        nonlocal start
        if found.keys() != {_ARRAY}:
            return found
        name, shape = found[_ARRAY]
        dtype = np.dtype(str(name))
        if dtype.kind not in "biuf" or any(type(side) is not int or side < 0 for side in shape):
            raise ValueError(f"an array of dtype {dtype} and shape {shape}")
        end = start + math.prod(shape) * dtype.itemsize
        array = np.frombuffer(data[start:end], dtype).reshape(shape).copy()
        start = end
        return array

    value = json.loads(text, object_hook=restored)
    if start != len(data):
        raise ValueError(f"{len(data)} bytes of arrays, not {start}")
    return value


def in_turn(function: Callable[[], Result]) -> Result:
    """Calls `function` in the first process, then in all others at once, and returns its result.

    The others find the files that the first one made. All must call it.

    Raises:
        ConfigError: in every process, if the first one raised it.
    """
    results: list[Result] = []
    error: str | None = None
    if is_first():
        try:
            results.append(function())
        except ConfigError as refused:
            error = str(refused)
    error = gather(error)[0]
    if error is not None:
        raise ConfigError(error)
    return results[0] if results else function()


def of_first(tree: Any) -> Any:
    """Returns the first process's arrays to all processes. All must call it."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def refuse_differing(values: dict[str, Any]) -> None:
    """Raises ConfigError naming the first of `values` that differs between the processes."""
    by_process = gather(values)
    for name in values:
        found = [there[name] for there in by_process]
        if any(value != found[0] for value in found):
            raise ConfigError(
                f"{name}: differs between the processes: {', '.join(map(str, found))}"
            )


# -- devices ---------------------------------------------------------------------------------------


def data_mesh() -> Mesh | None:
    """Returns a mesh of all devices along one axis, process by process; None if there is only one.

    Raises:
        ConfigError: the processes have different numbers of devices.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    counts = Counter(device.process_index for device in devices).values()
    if len(set(counts)) > 1:
        raise ConfigError(
            "distributed: the processes have different numbers of devices:"
            f" {', '.join(map(str, counts))}"
        )
    return Mesh(np.array(devices), (AXIS,)) if len(devices) > 1 else None


def refuse_uneven(batch_size: int, mesh: Mesh | None) -> None:
    """Raises ConfigError unless the rows of a batch divide evenly among the devices."""
    if mesh is None or batch_size % mesh.size == 0:
        return
    below = batch_size // mesh.size * mesh.size
    nearest = f"{below} and {below + mesh.size} do" if below else f"{mesh.size} does"
    fewer = ""
    if jax.default_backend() == "gpu" and jax.process_count() == 1:
        most = max(count for count in range(1, mesh.size) if batch_size % count == 0)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(mesh.size)))
        numbers = ",".join(visible.split(",")[:most])
        fewer = f"; CUDA_VISIBLE_DEVICES={numbers} before the command trains on {most} of them"
    raise ConfigError(
        f"data.batch_size: {batch_size} images do not divide by {mesh.size} devices ({nearest})"
        f"{fewer}"
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


# -- placement of arrays ---------------------------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding along the first axis."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def spread(leaf: Any, mesh: Mesh) -> NamedSharding:
    """Returns the sharding of `leaf` along its longest axis that the number of devices divides.

    Without such an axis there is a copy on every device.
    """
    axes = [axis for axis, side in enumerate(leaf.shape) if side > 0 and side % mesh.size == 0]
    if not axes:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, AXIS))


def place(tree: Any, layout: Any) -> Any:
    """Copies host arrays that every process has to the devices, into memory of their own.

    Args:
        tree: arrays, the same in every process.
        layout: a tree of shardings, one per leaf.
    """

    def leaf(host: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(host)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(jax.numpy.array, jax.tree.map(leaf, tree, layout))


def bytes_a_device(tree: Any) -> int:
    """Returns the bytes that the arrays take on the first of this process's devices."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Puts a batch on the devices, from this process's rows; without a mesh returns it as it is."""
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(by_rows(mesh), leaf), tree
    )


def to_host(tree: Any) -> Any:
    """Returns the whole arrays as NumPy ones to every process. All must call it."""

    def leaf(array: Any) -> np.ndarray:
        whole = (
            not isinstance(array, jax.Array)
            or array.is_fully_addressable
            or array.is_fully_replicated
        )
        return np.asarray(array) if whole else multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(leaf, tree)


def rows_to_host(tree: Any, mesh: Mesh | None) -> Any:
    """Returns this process's rows as NumPy arrays."""
    if mesh is not None:
        tree = multihost_utils.global_array_to_host_local_array(tree, mesh, PartitionSpec(AXIS))
    return jax.device_get(tree)


def one_ahead(dispatched: Iterable[Result]) -> Iterator[Result]:
    """Yields each value once the next one was made: a device works on that one meanwhile.

    Args:
        dispatched: each value is made by a call that returns before the device is done.
    """
    end: Any = None
    return (value for value, _ in pairwise(chain(dispatched, (end,))))
