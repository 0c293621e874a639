"""How much a step takes, and what is said when that was too much."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.config.model import ResNetConfig
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import example_batch
from mrcnn_jax.models.resnet import ResNet
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Batch
from mrcnn_jax.training.memory import (
    GIB,
    device_memory,
    host_memory,
    out_of_memory,
    program_bytes,
)

MODEL = ResNet(ResNetConfig(depth=10, width=8))
CANVAS = (192, 256)
SIZE = 12


def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
    """Gradient descent on nothing in particular."""

    def loss(params: Any) -> Any:
        maps = MODEL.apply(
            {"params": params, "batch_stats": state.batch_stats}, batch.images.astype(jnp.float32)
        )
        return jnp.mean(jnp.square(maps["c5"]))

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.replace(params=jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)), {
        "loss/total": value
    }


TRAIN_STEP = jax.jit(step, donate_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def state() -> TrainState:
    variables = initialise(MODEL, np.zeros((1, *CANVAS, 3), np.float32), seed=0)
    return TrainState(
        variables["params"],
        variables["batch_stats"],
        opt_state=(),
        step=jnp.int32(0),
        key=jnp.zeros(2, jnp.uint32),
    )


def batch(size: int) -> Batch:
    return jax.tree.map(lambda leaf: np.repeat(leaf, size, axis=0), example_batch(CANVAS))


def needed(state: TrainState, size: int) -> int:
    return program_bytes(TRAIN_STEP.lower(state, batch(size)).compile())


@pytest.fixture(scope="module")
def exhausted() -> Exception:
    """The error that XLA raises without room, here for a pebibyte."""
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jnp.zeros(2**48).block_until_ready()
    return error.value


def test_the_bytes_of_a_program_are_those_of_its_arrays() -> None:
    """A donated argument and its result count once, and the square of a matrix, with sorted
    columns, is a temporary: two of 4 MB in all."""

    def program(total: Any, x: Any) -> Any:
        return total + jnp.sort(x @ x, axis=0).sum(
            0
        )  # a sort, which no compiler fuses with what is around it

    matrix = jnp.ones((1000, 1000))
    compiled = jax.jit(program, donate_argnums=0).lower(jnp.ones(1000), matrix).compile()
    assert program_bytes(compiled) == pytest.approx(2 * matrix.nbytes + 4000, rel=0.05)


@pytest.mark.parametrize("multiple", [1, 4])
def test_the_batch_that_is_named_is_the_largest_that_fits(
    multiple: int, state: TrainState, exhausted: Exception
) -> None:
    """Held against what the compiler says of that batch and of the next one."""
    wanted = 8
    limit = (needed(state, wanted) + needed(state, wanted + multiple)) // 2
    line = out_of_memory(
        exhausted, TRAIN_STEP, state, batch(SIZE + multiple), limit=limit, multiple=multiple
    )
    assert line is not None
    found = re.fullmatch(
        rf"out of device memory: a step of batch {SIZE + multiple} needs about (\d+\.\d\d) GiB, "
        rf"the device has {limit / GIB:.2f}: batch (\d+) fits \(--data.batch-size \2, "
        r"with another --workdir; --model.remat makes more fit\)",
        line,
    )
    assert found is not None, line
    assert int(found[2]) == wanted
    assert float(found[1]) == pytest.approx(needed(state, SIZE + multiple) / GIB, abs=0.01)


def test_shapes_are_enough(state: TrainState, exhausted: Exception) -> None:
    """The state was donated to the step that failed: its arrays are gone."""
    gone = jax.tree.map(jnp.array, state)
    for leaf in jax.tree.leaves(gone):
        leaf.delete()
    assert (
        out_of_memory(exhausted, TRAIN_STEP, gone, batch(SIZE), limit=needed(state, 4)) is not None
    )


def test_no_batch_fits_or_another_program_is_in_the_way(
    state: TrainState, exhausted: Exception
) -> None:
    line = out_of_memory(exhausted, TRAIN_STEP, state, batch(SIZE), limit=1000)
    assert line is not None
    assert "no batch fits, 1 needs about" in line
    line = out_of_memory(exhausted, TRAIN_STEP, state, batch(SIZE), limit=10 * GIB)
    assert line is not None
    assert "the device has 10.00: something else holds a part of it (nvidia-smi lists" in line
    line = out_of_memory(
        exhausted, TRAIN_STEP, state, batch(SIZE)
    )  # a CPU does not say what it has
    assert line is not None
    assert line.endswith("(--data.batch-size, --model.remat, --data.canvases make it less)")


def test_other_errors_are_not_explained(state: TrainState) -> None:
    assert (
        out_of_memory(
            ValueError("a label out of range"), TRAIN_STEP, state, batch(SIZE), limit=1000
        )
        is None
    )


# -- of the machine --------------------------------------------------------------------------------


def machine(root: Path, cgroups: str, **files: str) -> Path:
    """The files that Linux tells its memory in: 8 GiB in all, 6 GiB of them available."""
    contents = {
        "proc/meminfo": f"MemTotal: {8 * 2**20} kB\nMemFree: 9 kB\nMemAvailable:  {6 * 2**20} kB\n",
        "proc/self/cgroup": cgroups,
    }
    for name, content in {**contents, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def of_group(folder: str, limit: str, used: str, unused: int = 0) -> dict[str, str]:
    stat = f"anon 7\ninactive_file {unused}\nactive_file 9\n"
    here = f"sys/fs/cgroup/{folder}"
    return {f"{here}memory.max": limit, f"{here}memory.current": used, f"{here}memory.stat": stat}


NEW, OLD = "0::/a/b\n", "5:cpuset:/\n4:hugetlb,memory:/a\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "gib"),
    [
        ("", {}, 6),
        (NEW, {}, 6),
        (NEW, of_group("a/b/", "max\n", "5\n"), 6),
        (NEW, of_group("a/b/", f"{4 * GIB}\n", f"{3 * GIB}\n"), 1),
        (NEW, of_group("a/b/", f"{4 * GIB}\n", f"{3 * GIB}\n", unused=2 * GIB), 3),
        (NEW, of_group("a/b/", f"{9 * GIB}\n", "0\n"), 6),
        # That of a group further up, and in a container, where only its own is to be seen.
        (NEW, of_group("a/b/", "max", "1") | of_group("a/", f"{3 * GIB}", f"{GIB}"), 2),
        (NEW, of_group("", f"{3 * GIB}", f"{GIB}"), 2),
        (NEW, of_group("", f"{3 * GIB}", f"{4 * GIB}"), 0),
        (
            OLD,
            {
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/a/memory.stat": f"cache 1\ntotal_inactive_file {GIB}\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            },
            2,
        ),
    ],
)
def test_the_memory_that_is_available_is_the_least_that_is_left(
    groups: str, files: dict[str, str], gib: float, tmp_path: Path
) -> None:
    assert host_memory(machine(tmp_path, groups, **files)) == gib * GIB


def test_without_linuxs_files_the_memory_is_not_known(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None


def test_devices_of_a_cpu_share_what_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = device_memory()
    total = int(re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    assert whole is not None
    assert 0 < whole <= total
    monkeypatch.setattr(jax, "local_devices", lambda: 4 * jax.devices()[:1])
    assert device_memory() == pytest.approx(whole / 4, rel=0.3)  # others use it, too


def test_a_gpu_tells_what_jax_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of several; no device machine is needed for that."""

    class Gpu:
        platform = "gpu"

        def __init__(self, limit: int | None) -> None:
            self._limit = limit

        def memory_stats(self) -> dict[str, int] | None:
            return None if self._limit is None else {"bytes_limit": self._limit, "bytes_in_use": 3}

    for limits, found in (((7, 5), 5), ((None,), None), ((None, 9), 9)):
        monkeypatch.setattr(jax, "local_devices", lambda limits=limits: [Gpu(n) for n in limits])
        assert device_memory() == found
