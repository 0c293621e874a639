"""The three laws of padded sets (docs/architecture.md), for any function of one.

A function under test takes `rows`, a dict of arrays that share their first axis, and `valid`. It
answers with `Outcome(rows=..., totals=...)`: what belongs to each row (compared where the row is
valid) and what belongs to the set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Rows = dict[str, np.ndarray]


class Outcome(NamedTuple):
    rows: Any = ()
    totals: Any = ()


Function = Callable[[dict[str, jax.Array], jax.Array], Outcome]
POISONS = (np.nan, 1e9, -1e9)


def poisoned(rows: Rows, valid: np.ndarray, poison: float) -> Rows:
    """Puts `poison` into invalid rows; integers get the smallest number of their type, or 1e9."""
    result = {}
    for name, values in rows.items():
        values = values.copy()
        if values.dtype == bool:
            values[~valid] = poison > 0
        elif np.issubdtype(values.dtype, np.integer):
            info = np.iinfo(values.dtype)
            values[~valid] = info.min if not poison > 0 else min(info.max, 10**9)
        else:
            values[~valid] = poison
        result[name] = values
    return result


def evaluate(
    function: Function, rows: Rows, valid: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Returns row results, totals, and gradients of a fixed mixture of all float results."""
    floats = {
        name: jnp.array(values)
        for name, values in rows.items()
        if np.issubdtype(values.dtype, np.floating)
    }
    others = {name: jnp.array(values) for name, values in rows.items() if name not in floats}
    gradients, outcome = _program(function)(floats, others, jnp.array(valid))
    return tuple(
        [np.asarray(leaf) for leaf in jax.tree.leaves(part)]
        for part in (outcome.rows, outcome.totals, gradients)
    )  # type: ignore[return-value]


@functools.lru_cache(maxsize=1)  # one function after the other
def _program(function: Function) -> Callable[..., Any]:
    """(floats, others, mask) -> (gradients by floats, outcome), compiled: rows that are poison go
    through the very program that those without did."""

    def mixture(
        floats: dict[str, jax.Array], others: dict[str, jax.Array], mask: jax.Array
    ) -> tuple[jax.Array, Outcome]:
        outcome = function({**floats, **others}, mask)
        value = jnp.zeros((), jnp.float32)
        for leaf in jax.tree.leaves(outcome.rows):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                flat = leaf.reshape(leaf.shape[0], -1)
                weights = jnp.arange(1, flat.shape[1] + 1, dtype=jnp.float32)[None]
                value += jnp.sum(jnp.where(mask[:, None], weights * flat, 0))
        for leaf in jax.tree.leaves(outcome.totals):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                value += jnp.sum(leaf)
        return value, outcome

    return jax.jit(jax.grad(mixture, has_aux=True))


def _close(ours: np.ndarray, reference: np.ndarray) -> None:
    if np.issubdtype(reference.dtype, np.floating):
        np.testing.assert_allclose(
            ours, reference, rtol=1e-6, atol=1e-6 * max(np.abs(reference).max(initial=0), 1e-30)
        )
    else:
        np.testing.assert_array_equal(ours, reference)


def assert_poison_changes_nothing(function: Function, rows: Rows, valid: np.ndarray) -> None:
    """Results and gradients are bit-equal whatever invalid rows hold; no gradient reaches these."""
    reference = evaluate(function, rows, valid)
    for gradient in reference[2]:
        assert np.isfinite(gradient).all()
    for poison in POISONS:
        by_row, totals, gradients = evaluate(function, poisoned(rows, valid, poison), valid)
        for ours, expected in zip(by_row, reference[0], strict=True):
            np.testing.assert_array_equal(ours[valid], expected[valid])
        for ours, expected in zip(totals, reference[1], strict=True):
            np.testing.assert_array_equal(ours, expected)
        for ours, expected in zip(gradients, reference[2], strict=True):
            np.testing.assert_array_equal(ours, expected)
            assert (ours[~valid] == 0).all()


def assert_order_does_not_matter(function: Function, rows: Rows, valid: np.ndarray) -> None:
    """Permuted rows give permuted results and gradients, and the same totals (sums to 1e-6)."""
    order = np.random.default_rng(0).permutation(len(valid))
    reference = evaluate(function, rows, valid)
    by_row, totals, gradients = evaluate(
        function, {name: values[order] for name, values in rows.items()}, valid[order]
    )
    for ours, expected in zip(by_row, reference[0], strict=True):
        _close(ours[valid[order]], expected[order][valid[order]])
    for ours, expected in zip(totals, reference[1], strict=True):
        _close(ours, expected)
    for ours, expected in zip(gradients, reference[2], strict=True):
        _close(ours, expected[order])


def assert_padding_does_not_matter(
    function: Function, rows: Rows, valid: np.ndarray, more: int = 5
) -> None:
    """`more` invalid rows at the end leave results, totals and gradients as they were (to 1e-6)."""
    longer = {
        name: np.concatenate([values, np.repeat(values[:1], more, axis=0)])
        for name, values in rows.items()
    }
    n = len(valid)
    reference = evaluate(function, rows, valid)
    by_row, totals, gradients = evaluate(
        function, longer, np.concatenate([valid, np.zeros(more, bool)])
    )
    for ours, expected in zip(by_row, reference[0], strict=True):
        _close(ours[:n][valid], expected[valid])
    for ours, expected in zip(totals, reference[1], strict=True):
        _close(ours, expected)
    for ours, expected in zip(gradients, reference[2], strict=True):
        _close(ours[:n], expected)


def assert_laws(function: Function, rows: Rows, valid: np.ndarray) -> None:
    assert_poison_changes_nothing(function, rows, valid)
    assert_order_does_not_matter(function, rows, valid)
    assert_padding_does_not_matter(function, rows, valid)
