from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mrcnn_jax.ops.sampling import Samples, drop_path_keys, gather_samples, image_keys, sample

from .strategies import QUICK


def draw(
    positive: np.ndarray, negative: np.ndarray, *, count: int, fraction: float, seed: int = 0
) -> Samples:
    return sample(
        jax.random.key(seed),
        positive=jnp.array(positive),
        negative=jnp.array(negative),
        count=count,
        positive_fraction=fraction,
    )


@QUICK
@given(
    hnp.arrays(bool, 20),
    hnp.arrays(bool, 20),
    st.sampled_from([1, 4, 16, 30]),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.integers(0, 99),
)
def test_counts_and_membership(
    positive: np.ndarray, negative: np.ndarray, count: int, fraction: float, seed: int
) -> None:
    drawn = draw(positive, negative, count=count, fraction=fraction, seed=seed)
    positives = min(positive.sum(), int(count * fraction))
    negatives = min((negative & ~positive).sum(), count - positives)
    assert drawn.indices.shape == (count,)
    assert drawn.indices.dtype == jnp.int32
    np.testing.assert_array_equal(drawn.positive, np.arange(count) < positives)
    np.testing.assert_array_equal(drawn.valid, np.arange(count) < positives + negatives)
    indices = np.asarray(drawn.indices)
    rows = indices[np.asarray(drawn.valid)]
    assert len(set(rows.tolist())) == len(rows)
    assert positive[rows[:positives]].all()
    assert (negative & ~positive)[rows[positives:]].all()
    assert (indices[~np.asarray(drawn.valid)] == 0).all()


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(100, 0.29, 29), (64, 0.75, 48), (256, 0.5, 128), (7, 0.5, 3), (10, 0.1, 1)],
)
def test_most_positives(count: int, fraction: float, expected: int) -> None:
    everything = np.ones(300, bool)
    everything[-1] = False
    assert (
        int(draw(everything, ~everything, count=count, fraction=fraction).valid.sum())
        == expected + 1
    )


def frequencies(count: int, fraction: float, choose: Callable[[Samples], jax.Array]) -> np.ndarray:
    """Counts how often each of 12 rows (5 positive, 6 negative, 1 neither) is drawn, 4,000 keys."""
    rows = jnp.arange(12)

    def once(key: jax.Array) -> jax.Array:
        drawn = sample(
            key,
            positive=rows < 5,
            negative=(rows >= 5) & (rows < 11),
            count=count,
            positive_fraction=fraction,
        )
        return jnp.zeros(12, jnp.float32).at[drawn.indices].add(choose(drawn).astype(jnp.float32))

    return np.asarray(
        jax.jit(lambda keys: jnp.mean(jax.vmap(once)(keys), axis=0))(
            jax.random.split(jax.random.key(1), 4000)
        )
    )


def test_every_row_of_a_kind_is_as_likely() -> None:
    expected = np.array([2 / 5] * 5 + [2 / 6] * 6 + [0])
    sigma = np.sqrt(0.25 / 4000)
    np.testing.assert_allclose(
        frequencies(4, 0.5, lambda drawn: drawn.valid), expected, atol=4 * sigma
    )


def test_the_first_slot_is_as_likely_any_positive() -> None:
    """Order within the drawn rows is random too: no row is preferred by position."""
    expected = np.array([1 / 5] * 5 + [0] * 7)
    sigma = np.sqrt(0.2 * 0.8 / 4000)
    np.testing.assert_allclose(
        frequencies(4, 0.5, lambda drawn: jnp.arange(4) == 0), expected, atol=4 * sigma
    )


def test_the_draw_depends_on_the_key_alone() -> None:
    rows = np.arange(50) < 30
    first, again, other = (
        draw(rows, ~rows, count=16, fraction=0.5, seed=seed).indices.tolist() for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_drawn_rows_and_their_gradient() -> None:
    """Empty slots read 0 whatever row 0 holds, and give it no gradient."""
    values = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    values[0] = np.nan
    samples = Samples(
        indices=jnp.array([7, 2, 5, 0, 0], jnp.int32),
        positive=jnp.zeros(5, bool),
        valid=jnp.array([True, True, True, False, False]),
    )
    found, pull = jax.vjp(lambda x: gather_samples(x, samples), jnp.asarray(values))
    np.testing.assert_array_equal(found, np.vstack([values[[7, 2, 5]], np.zeros((2, 4))]))
    (gradient,) = pull(jnp.arange(1, 21, dtype=jnp.float32).reshape(5, 4))
    expected = np.zeros((9, 4))
    expected[[7, 2, 5]] = np.arange(1, 13).reshape(3, 4)
    np.testing.assert_array_equal(gradient, expected)


def test_keys_of_images_are_those_of_their_indices() -> None:
    """As docs/architecture.md spells them out; no two draws of a step share one."""
    key, indices = jax.random.key(5), [7, 0, 3, 7]
    drawn = *image_keys(key, jnp.array(indices, jnp.int32)), drop_path_keys(key, jnp.array(indices))
    found = np.stack([jax.random.key_data(keys) for keys in drawn], axis=1)
    expected = []
    for index in indices:
        image = jax.random.fold_in(key, index)
        own = *jax.random.split(image), *(jax.random.fold_in(image, n) for n in (2, 0x64726F70))
        expected.append([jax.random.key_data(one) for one in own])
    np.testing.assert_array_equal(found, expected)
    assert len({one.tobytes() for one in found[:3].reshape(12, -1)}) == 12
