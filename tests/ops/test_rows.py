"""Heads on the rows that exist, against the same function of all rows."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrcnn_jax.ops.rows import apply_to_valid_rows, fresh_zeros
from mrcnn_jax.runtime import compile_options

ROWS, CHUNK = 22, 4  # the last chunk is not full
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 5)).astype(np.float32)
INPUT = RNG.normal(size=(ROWS, 3)).astype(np.float32)
WEIGHTS = RNG.normal(size=(ROWS, 5)).astype(np.float32)


def outputs(kernel: jax.Array, rows: jax.Array, valid: jax.Array, chunk: int) -> jax.Array:
    def function(kernel: jax.Array, part: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"y": jnp.tanh(part["x"] @ kernel) * part["factor"][:, None].astype(jnp.float32)}

    tree = {"x": rows, "factor": jnp.arange(len(rows), dtype=jnp.int32)}
    return apply_to_valid_rows(function, kernel, tree, valid, chunk=chunk)["y"]


def loss(kernel: jax.Array, rows: jax.Array, valid: jax.Array, chunk: int) -> jax.Array:
    found = outputs(kernel, rows, valid, chunk)
    return jnp.sum(jnp.where(valid[:, None], found, 0) * WEIGHTS)


FORWARD = jax.jit(outputs, static_argnums=3)
GRADIENT = jax.jit(jax.grad(loss, (0, 1)), static_argnums=3)


@given(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
@settings(max_examples=40, deadline=None)
def test_outputs_and_gradients_are_those_of_all_rows_at_once(exists: list[bool]) -> None:
    """Any rows, in any order, none or all."""
    valid = np.array(exists)
    ours, whole = (np.asarray(FORWARD(KERNEL, INPUT, valid, chunk)) for chunk in (CHUNK, ROWS))
    np.testing.assert_allclose(ours[valid], whole[valid], rtol=1e-6, atol=1e-6)
    assert np.isfinite(ours).all()
    ours, whole = (GRADIENT(KERNEL, INPUT, valid, chunk) for chunk in (CHUNK, ROWS))
    for a, b in zip(ours, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * (1 + np.abs(b).max()))
    if not valid.any():
        assert not any(np.any(a) for a in ours)


@pytest.mark.parametrize("count", [0, 1, CHUNK, CHUNK + 1, ROWS])
def test_only_chunks_that_hold_a_row_are_computed(count: int) -> None:
    """The function counts its own calls."""
    calls: list[int] = []

    def function(factor: jax.Array, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(1))
        return factor * x

    valid = np.arange(ROWS) < count
    doubled = jax.jit(
        lambda x, v: apply_to_valid_rows(function, jnp.float32(2), x, v, chunk=CHUNK)
    )(INPUT, valid)
    jax.effects_barrier()
    assert len(calls) == -(-count // CHUNK)
    np.testing.assert_array_equal(np.asarray(doubled)[valid], 2 * INPUT[valid])


def test_a_chunk_that_is_left_out_gives_nothing_whatever_it_holds() -> None:
    """A gradient of 0 times infinity would be NaN."""
    rows, valid = INPUT.copy(), np.arange(ROWS) < CHUNK
    rows[2 * CHUNK :] = np.nan
    for gradient in GRADIENT(KERNEL, rows, valid, CHUNK):
        assert np.isfinite(gradient).all()
    assert not np.any(np.asarray(FORWARD(KERNEL, rows, valid, CHUNK))[2 * CHUNK :])


def test_rows_without_a_gradient_cost_no_backward_pass() -> None:
    """Two products by the kernel alone, forward and backward; the rows' gradient is a third."""
    counts = []
    for wanted in (0, (0, 1)):
        gradient = jax.jit(jax.grad(loss, wanted), static_argnums=3)
        program = gradient.lower(KERNEL, INPUT, np.ones(ROWS, bool), CHUNK).compile()
        counts.append(program.as_text().count(" dot("))
    assert counts == [2, 3]


def test_loops_do_not_keep_zeros_for_each_other() -> None:
    """Five loops in a row that each fill an array: one array is enough for all of them."""
    shape = jax.ShapeDtypeStruct((1024, 64), jnp.float32)
    kernel = jnp.ones((64, 64))

    def temporaries(zeros: Callable[[jax.Array], jax.Array]) -> float:
        def filled(x: jax.Array) -> jax.Array:
            def add(i: jax.Array, y: jax.Array) -> jax.Array:
                part = jax.lax.dynamic_slice_in_dim(x, 128 * i, 128)
                return jax.lax.dynamic_update_slice_in_dim(y, jnp.sin(part), 128 * i, axis=0)

            return jax.lax.fori_loop(0, 8, add, zeros(x))

        def program(x: jax.Array) -> jax.Array:
            for _ in range(5):
                x = jnp.tanh(filled(x) @ kernel)
            return x

        compiled = jax.jit(program, **compile_options()).lower(shape).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes / (4 * 1024 * 64)

    assert temporaries(lambda x: fresh_zeros(shape, after=x)) < 1.2
    assert temporaries(lambda x: jnp.zeros(x.shape)) > 1.8  # else nobody needs it
